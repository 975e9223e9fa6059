"""What every acceptance figure means, and what other engines call it.

Owns: words. They are printed with the figures, stand in every report, and make the tables of docs/acceptance.md.
Must never compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from speculator.bench.records import Name

DEFINITIONS: Mapping[str, str] = {
    "round": "One verification of a draft by the target. Reading the prompt, the token sampled after it, and warm-up"
    " are no rounds. Nothing past the end of an answer counts: neither drafted, nor accepted, nor committed.",
    "tokens": "Token ids that rounds committed, each counted once, up to the limit or the end mark, which counts too.",
    "tau": "Tokens per round, the bonus token included (mean acceptance length); totals divided by totals.",
    "tau_without_bonus": "Accepted drafted tokens per round.",
    "acceptance_rate": "Accepted drafted tokens over draft positions that were really drafted inside the answer; of a"
    " tree, its levels count and not its nodes.",
    "survival": "Rounds whose draft was accepted up to position i or further, over all rounds.",
    "conditional": "Rounds accepted at position i, over rounds that drafted i and accepted everything before it.",
    "acceptance": "Rounds accepted at position i, over rounds that drafted position i.",
    "histogram": "Rounds by the number of accepted drafted tokens.",
    "mean_tau": "Unweighted mean of tau over prompt sets.",
    "intervals": "Bootstrap over prompts, all turns of one together; percentiles expanded for small samples.",
    "counterfactual": "The same answers with drafts of another shape. Exact for greedy and coupled sampling: a draft"
    " depends on the tokens before it alone, and one was made at every position of the answers.",
    "calibration": "Confidence is exp(log q) of a drafted token; counted are tokens whose predecessors were accepted."
    " ECE is the mean over tokens of |acceptance - confidence| of their bin, ten bins of equal width.",
    "theory": "1 - TV(p, q), the acceptance of the rejection rule at a position, from the full distributions, over"
    " rounds whose earlier tokens were accepted.",
    "token_classes": "Judged positions by the class of the token that the answer has there.",
    "repeated_4grams": "Share of an answer's 4-grams that stood in it before; mean over answers. High values mean that"
    " the target repeats itself and tau is flattered.",
    "shared": "Share of an answer's distinct n-grams that answers to other prompts have too; mean over answers. High"
    " values mean that the target says the same to everybody.",
    "halves": "Two random halves of the prompts measured as if they were two runs: what noise alone does.",
    "seeds": "The same run with another seed.",
    "ledger": "The mean round of one session, part after part. draft: the head's passes. verify: the target's pass, the"
    " verdict, the head's catch-up. commit: taking the result over and looking for the end. host: everything else"
    " between two rounds, over gRPC the server's own work and waiting too. rpc: what a client waits beyond the server. "
    "A GPU works behind the host: there only the sum of draft and verify is right.",
    "predicted": "Speed-up expected from tau * plain_token / round, with median times of one session.",
    "measured": "Speed-up found: tokens per second by a clock that runs through the timed answers, over that of plain"
    " decoding in the same run, prompts excluded.",
    "gap": "predicted / measured - 1: how far the parts on the clock explain the speed-up.",
    "context": "Committed tokens before a round, prompt included.",
}

NAMES: tuple[Name, ...] = (
    Name("tau", "mean acceptance length (1 + num_accepted_tokens / num_drafts)", "accept length", "acceptance length"),
    Name("tau_without_bonus", "num_accepted_tokens / num_drafts", "accept length - 1", "accepted tokens per step"),
    Name("acceptance_rate", "draft acceptance rate (num_accepted_tokens / num_draft_tokens)", "accept rate",
         "acceptance rate"),
    Name("survival", "per-position acceptance rate (num_accepted_tokens_per_pos / num_drafts)", "", ""),
    Name("conditional", "", "", ""),
    Name("rounds", "num_drafts", "spec_verify_ct", ""),
    Name("drafted", "num_draft_tokens", "", "total draft tokens"),
    Name("accepted", "num_accepted_tokens", "", "total accepted draft tokens"),
)  # fmt: skip


def markdown() -> str:
    """The definitions and names as two tables."""
    meanings = _table(("Figure", "Meaning"), [(f"`{key}`", text) for key, text in DEFINITIONS.items()])
    rows = [(f"`{n.here}`", n.vllm, n.sglang, n.tensorrt_llm) for n in NAMES]
    return f"{meanings}\n\n{_table(('Here', 'vLLM', 'SGLang', 'TensorRT-LLM'), rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
