"""Reads the folder of a published head, whatever exporter wrote it, into one record.

Owns: putting the record together, checking it against tensors and target, and the strictness about tensor names.
Must never know devices, modules or what a head is used for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from speculator.errors import CheckpointError
from speculator.heads.detect import is_whole_model
from speculator.heads.folder import HeadFolder, checkpoint_errors, mapping
from speculator.heads.mtp_file import read_mtp
from speculator.heads.names import head_slots
from speculator.heads.overrides import parse_overrides
from speculator.heads.reading import HeadFile, Reading, TargetFacts, note_overrides
from speculator.heads.record import HeadRecord
from speculator.heads.sizes import read_sizes
from speculator.heads.switches import read_switches
from speculator.heads.taps import check_boundaries
from speculator.heads.vocabulary import read_vocabulary
from target.config import read_json
from target.weights import Slot, WeightFiles, check_names


def read_head(
    folder: Path, target: TargetFacts | None = None, overrides: Mapping[str, object] | None = None
) -> HeadFile:
    """Read a head's folder, or the MTP modules inside a target's.

    Without a target, what only it settles stays open and nothing is checked against it.

    CheckpointError says which file, key or tensor is wrong: missing, unknown, misshapen, of a family that is not run,
    or made for another target. ConfigError: an override that does not exist or does not parse.
    """
    parsed = parse_overrides(overrides or {})
    with checkpoint_errors(folder):
        read_json(folder / "config.json")  # its errors come first
        if is_whole_model(WeightFiles(folder).names()):
            return read_mtp(folder, target, parsed)
        return _read(Reading(HeadFolder(folder), target, parsed))


def _read(reading: Reading) -> HeadFile:
    r = reading
    read = HeadRecord(kind=r.source.kind, **read_sizes(r), **read_vocabulary(r), **read_switches(r))
    record = r.overrides.apply(read)
    note_overrides(r.choices, r.overrides, read, record)
    _check(r, record)
    _check_verifier(r)
    slots, published = _slots(r, record, read), r.source.published
    return HeadFile(
        folder=r.source.folder,
        record=record,
        slots={published[name]: slot for name, slot in slots.items()},
        tensors={published[name]: r.source.tensors[name] for name in slots},
        target_ids=r.target_ids if record.d2t else None,
        choices=tuple(r.choices.values()),
        unused=tuple(sorted(published[name] for name in set(published) - set(slots))),
        warnings=tuple(r.warnings),
    )


def _check(reading: Reading, record: HeadRecord) -> None:
    r = record
    if reading.source.has("fc.weight"):
        _check_fc(reading, r)
    if r.norm_before_fc and r.fc_norm:
        raise CheckpointError("norm_before_fc and fc_norm exclude each other, the file has both")
    own_head = r.own_lm_head or r.lm_head_is_embed
    if not own_head and r.draft_vocab_size != r.vocab_size:
        raise CheckpointError("without an lm_head of its own a head drafts over the target's whole vocabulary")
    borrows = {"embed_tokens": not r.own_embed, "lm_head": not own_head, "fc": r.kind == "eagle3" and not r.fc}
    for tensor in (name for name, borrowed in borrows.items() if borrowed and r.hidden_size != r.target_hidden_size):
        raise CheckpointError(
            f"the head has no {tensor} of its own and is {r.hidden_size} wide, the target {r.target_hidden_size}; "
            "is it made for another target?"
        )


def _check_fc(reading: Reading, record: HeadRecord) -> None:
    """The width of fc's input tells the target's width and the number of taps."""
    ours, layers = record.target_hidden_size, reading.target.num_layers if reading.target else None
    width = reading.source.shape("fc.weight")[1] - (record.hidden_size if record.kind == "eagle" else 0)
    if width % ours or (record.kind == "eagle" and not width == ours == record.hidden_size):
        raise CheckpointError(
            f"fc reads hidden states of {width} values, the target's have {ours}; it was made for another target"
        )
    if record.boundaries or (width > ours and reading.target is not None):
        check_boundaries(record.boundaries, width // ours, layers)
        _check_declared_taps(reading, width // ours)


def _check_declared_taps(reading: Reading, taps: int) -> None:
    for key in ("num_aux_hidden_states", "num_aux_layers"):
        declared = reading.source.integer(key)
        if declared is not None and declared != taps:
            raise CheckpointError(f"config.json: {key} is {declared}, but fc reads {taps} hidden states")


def _check_verifier(reading: Reading) -> None:
    """A foreign name is a warning only: folders are renamed, and fine-tunes share heads."""
    verifier = mapping(mapping(reading.source.raw, "speculators_config"), "verifier")
    name, ours = str(verifier.get("name_or_path") or ""), reading.target.name if reading.target else ""
    if name and ours and _last_part(name) != _last_part(ours):
        reading.warnings.append(f"this head names {name} as its verifier, the target is {ours}")


def _last_part(name: str) -> str:
    return name.rstrip("/").split("/")[-1].lower()


def _slots(reading: Reading, record: HeadRecord, read: HeadRecord) -> dict[str, Slot]:
    """The record's tensors: all of them present, and nothing in the file left over but what is known to be."""
    slots, names = head_slots(record), reading.source.published
    spare = {"d2t", "t2d"} | ({"embed_tokens.weight"} - set(slots))
    if record != read:  # an override may leave a tensor without a use, never a use without a tensor
        spare |= set(head_slots(read)) - set(slots)
    found = {names[name] for name in set(names) - spare}
    check_names(found, {names.get(name, name) for name in slots}, reading.source.folder)
    return slots
