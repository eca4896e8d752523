"""Compare methods on a real model: what share of each fine-tune's gain does a merge keep?

    python scripts/zoo_table.py ZOO DATA --out benchmarks/NAME [--select 16] [--report 40]

ZOO holds `base` and the experts `code`, `french`, `wordnet`; DATA holds NAME.calibration.jsonl and
NAME.heldout.jsonl for each. A method's setting is chosen from its row of GRID on the first `--select` held-out
texts of each domain, and reported on the next `--report`, which chose nothing. The loss is the token-mean
cross-entropy of the first 256 tokens of each text; the share kept of an expert's gain is
(base - merged) / (base - expert) on its domain, and a method's figure is the mean over the domains.
Each finished line is appended to NAME.jsonl, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors.torch import load_file

import merger

Parameters = dict[str, Any] | list[dict[str, Any]]
"""A method's, or the stages of a pipeline."""
P = TypeVar("P", bound=Parameters)
DOMAINS = ("code", "french", "wordnet")
TOKENS = 256


def grid(**choices: list[Any]) -> list[dict[str, Any]]:
    """Every combination of the parameters' values."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


GRID: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "task_arithmetic": grid(**{"lambda": [0.4, 0.5, 0.6, 0.7, 0.8, 1]}),
    "ties": grid(density=[0.2, 0.5, 0.8], **{"lambda": [1, 1.4]}),
    "dare_linear": grid(density=[0.2, 0.5, 0.8], **{"lambda": [0.5, 0.7]}),
    "della": grid(density=[0.3, 0.5, 0.8], **{"lambda": [0.7, 1.1]}),
    "breadcrumbs": grid(drop_low=[0.2, 0.5, 0.8], **{"lambda": [0.6, 0.9]}),
    "ties_obm": grid(density=[0.2, 0.5, 0.8], **{"lambda": [1, 1.4]}),
    "ties_im": grid(density=[0.2, 0.3, "1/3"], **{"lambda": [1, 1.4]}),
    "cabs": grid(n=[32, 64], m=[256], **{"lambda": [1, 1.4, 1.8]}),
    "obim": grid(density=[0.2, 0.3, "1/3"], **{"lambda": [1, 1.4]}),
    "consensus_ta": grid(**{"lambda": [0.6, 0.9]}),
    "consensus_ties": grid(density=[0.5, 0.8], **{"lambda": [0.6, 0.9]}),
    "pcb": grid(density=[0.2, 0.5]),
    "localize_stitch": grid(density=[0.2, 0.5]),
    "sce": grid(select_topk=[0.1, 0.5, 1]),
    "ram": grid(r=[0, 0.1]),
    "model_stock": [{}],
    "metagpt": [{}],
    "nan": [{}],
    "multislerp": [{}],
    "karcher": [{}],
    "regmean_diag": [{}],
    "regmean": grid(alpha=[0.5, 0.7, 0.9, 0.95, 1]),
    "tsv_m": grid(**{"lambda": [0.8, 1, 1.2]}),
    "wudi": grid(omega=[0.1, 0.3, 1]),
    "wudi_svc": grid(omega=[0.1, 0.3, 1]),
    "actmat": grid(omega=[0.03, 0.1, 0.3, 1]),
    "iso_c": grid(**{"lambda": [1, 1.5, 2]}),
    "iso_cts": grid(**{"lambda": [1, 1.5, 2]}),
    "star": grid(eta=[40, 80], **{"lambda": [1, 1.5]}),
    "cart": grid(rank_share=[0.08, 0.3], **{"lambda": [0.5, 1]}),
    "knots": grid(inner=[{"ties": {"density": 1}}, {"ties": {"density": 1, "lambda": 1.4}}]),
    "opcm": [{}],
}
CALIBRATED = {"obim", "ties_obm", "regmean", "regmean_diag"}
HALVES: dict[str, list[dict[str, Any]]] = {  # of CABS: what thins, before the sum
    "neither": [{"top": {"density": 0.25}}],
    "CA only": [{"top": {"density": 0.25, "exclusive": "listed"}}],
    "BS only": [{"bs": {"n": 64, "m": 256}}],
}
CALIBRATED_BY_SVC = ("mean", "sum", "sign_elect", "tsv_m", "iso_c", "wudi")
"""Mergers by their defaults, whose singular values SVC calibrates."""
SEVERAL: list[tuple[str, Parameters]] = [  # outputs that hold each expert
    ("emr", {}),
    ("tall_masks", {}),
    ("byom", {"density": 0.1}),
    ("tsv_c", {}),
    ("factors", {"rank_share": 0.1}),
]
LAMBDAS = (0.7, 1)
BLOCKS = ((1, 4), (4, 16), (16, 64), (64, 256), (256, 1024), (1024, 4096))
"""n:m of one density, in blocks that grow."""
ORDERS: list[Any] = ["rotation", *({end: name} for end in ("first", "last") for name in DOMAINS)]
SAMPLES = (10, 50, 100)


def texts(data: Path, domain: str) -> list[str]:
    """The held-out texts of a domain."""
    lines = (data / f"{domain}.heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


class Judge:
    """One model whose weights are swapped in place, and texts that were tokenised once."""

    def __init__(self, base: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """The first tokens of each text, the short ones first, so that a batch needs little padding."""
        rows: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=TOKENS).input_ids
        return sorted(rows, key=len)

    def losses(self, checkpoint: Path, held_out: Mapping[str, list[list[int]]]) -> dict[str, float]:
        """Token-mean cross-entropy of a checkpoint on each domain's texts."""
        return {
            domain: sum(total for total, _ in rows) / sum(count for _, count in rows)
            for domain, rows in self.text_losses(checkpoint, held_out).items()
        }

    @torch.inference_mode()
    def text_losses(
        self, checkpoint: Path, held_out: Mapping[str, list[list[int]]]
    ) -> dict[str, list[tuple[float, int]]]:
        """The summed cross-entropy of a checkpoint on each text, and the text's tokens, by domain."""
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            weights |= load_file(file)
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not {*missing, *unexpected} - {"lm_head.weight"}, (missing, unexpected)  # the head is tied
        return {
            domain: [pair for start in range(0, len(rows), 8) for pair in self._losses(rows[start : start + 8])]
            for domain, rows in held_out.items()
        }

    def _losses(self, rows: list[list[int]]) -> list[tuple[float, int]]:
        """The summed cross-entropies of a batch; logits are made only for tokens that have a next one."""
        longest = max(map(len, rows))
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        hidden = self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        losses = []
        for row, states in zip(rows, hidden, strict=True):
            logits = self.model.lm_head(states[: len(row) - 1]).float()
            total = torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
            losses.append((total.item(), len(row) - 1))
        return losses


def weights_of(checkpoint: Path) -> int:
    """Bytes of its weight files."""
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def calibrated(method: str, parameters: Parameters) -> bool:
    """Whether some method or stage of a recipe looks at text."""
    text = json.dumps([method, parameters])
    return any(f'"{name}"' in text for name in CALIBRATED)


def recipe(zoo: Path, data: Path, method: str, parameters: Parameters, output: Path, samples: int) -> merger.Recipe:
    """The merge of the three experts by one method, by the stages of a ``pipeline``, or as a ``recipe``'s keys say."""
    choice: Any = {"pipeline": parameters} if method == "pipeline" else {"method": method, "parameters": parameters}
    content: dict[str, Any] = {
        "base": str(zoo / "base"),
        "experts": {name: str(zoo / name) for name in DOMAINS},
        **(parameters if method == "recipe" and isinstance(parameters, dict) else choice),
        "output": {"path": str(output)},
    }
    if calibrated(method, parameters):
        sources = {name: str(data / f"{name}.calibration.jsonl") for name in DOMAINS}
        content["calibration"] = {"data": sources, "samples": samples, "max_tokens": TOKENS}
    return merger.Recipe.parse(content)


class Table:
    """The lines found so far; one that is on record is not computed again."""

    def __init__(self, zoo: Path, data: Path, record: Path, select: int, report: int) -> None:
        self.zoo, self.data, self.record = zoo, data, record
        self.judge = Judge(zoo / "base")
        texts_by_domain = {domain: texts(data, domain) for domain in DOMAINS}
        self.parts = {
            "select": {
                domain: self.judge.tokens(domain_texts[:select]) for domain, domain_texts in texts_by_domain.items()
            },
            "report": {
                domain: self.judge.tokens(domain_texts[select : select + report])
                for domain, domain_texts in texts_by_domain.items()
            },
        }
        self.lines: dict[str, dict[str, Any]] = {}
        if record.exists():
            for line in record.read_text().splitlines():
                entry = json.loads(line)
                self.lines[entry["key"]] = entry

    def loss(self, part: str, model: str) -> dict[str, float]:
        """The losses of the base or of an expert."""
        return self._line(f"{part} {model}", lambda: self.judge.losses(self.zoo / model, self.parts[part]))

    def merged(self, part: str, method: str, parameters: Parameters, samples: int = 100) -> dict[str, float]:
        """The losses of a merge."""
        setting = json.dumps(parameters, sort_keys=True) + (
            f" samples={samples}" if calibrated(method, parameters) else ""
        )

        def compute() -> dict[str, float]:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "merged"
                merge_recipe = recipe(self.zoo, self.data, method, parameters, output, samples)
                inputs = merger.plan(merge_recipe).inputs
                if any(item.granularity == "block" and not item.follows_merge for item in inputs):
                    merger.calibrate(merge_recipe, gram=True)  # which the next merge of the same text finds
                merger.merge(merge_recipe)
                return self.judge.losses(output, self.parts[part])

        return self._line(f"{part} {method} {setting}", compute)

    def several(self, method: str, parameters: Parameters) -> dict[str, Any]:
        """Each expert's losses on its own domain as an output that holds all gives it back, and the output's size."""

        def compute() -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                packed = Path(folder) / "packed"
                losses: dict[str, float] = {}
                merger.merge(recipe(self.zoo, self.data, method, parameters, packed, 0))
                for domain in DOMAINS:
                    expert = Path(folder) / domain
                    merger.extract(packed, domain, expert, base=str(self.zoo / "base"))
                    losses |= self.judge.losses(expert, {domain: self.parts["report"][domain]})
                total_size = sum(weights_of(self.zoo / domain) for domain in DOMAINS)
                return {"losses": losses, "size": weights_of(packed) / total_size}

        return self._entry(f"report several {method} {json.dumps(parameters, sort_keys=True)}", compute)

    def _line(self, key: str, compute: Any) -> dict[str, float]:
        losses: dict[str, float] = self._entry(key, lambda: {"losses": compute()})["losses"]
        return losses

    def _entry(self, key: str, compute: Any) -> dict[str, Any]:
        if key not in self.lines:
            began = time.monotonic()
            self.lines[key] = {"key": key, **compute(), "seconds": round(time.monotonic() - began, 1)}
            with self.record.open("a") as file:
                file.write(json.dumps(self.lines[key]) + "\n")
            print(key, self.lines[key]["losses"], flush=True)
        return self.lines[key]

    def kept(self, part: str, losses: Mapping[str, float]) -> float:
        """The mean share of the experts' gains."""
        base = self.loss(part, "base")
        return sum((base[d] - losses[d]) / (base[d] - self.loss(part, d)[d]) for d in DOMAINS) / len(DOMAINS)

    def best(self, method: str, settings: Sequence[P]) -> P:
        """The setting that keeps most on the selection texts; nothing is chosen from one."""
        if len(settings) == 1:
            return settings[0]
        return max(settings, key=lambda p: self.kept("select", self.merged("select", method, p)))

    def row(self, name: str, setting: str, losses: Mapping[str, float]) -> str:
        cells = " | ".join(f"{losses[d]:.4f}" for d in DOMAINS)
        return f"| {name} | {setting} | {cells} | {self.kept('report', losses):.3f} |"


def report(table: Table) -> Iterator[str]:
    """The tables, in Markdown."""
    head = "| model | setting | " + " | ".join(DOMAINS) + " | share kept |\n|---|---|" + "---|" * (len(DOMAINS) + 1)
    yield head
    for model in ("base", *DOMAINS):
        yield table.row(model, "", table.loss("report", model))
    rows = []
    for method in GRID:
        setting = table.best(method, GRID[method])
        losses = table.merged("report", method, setting)
        rows.append((table.kept("report", losses), table.row(method, json.dumps(setting), losses)))
    yield from (line for _, line in sorted(rows, key=lambda row: -row[0]))
    density = table.best("obim", GRID["obim"])
    yield "\n## OBIM: order of the experts\n\n" + head
    for order in ORDERS:
        losses = table.merged("report", "obim", {**density, "order": order})
        yield table.row("obim", json.dumps({**density, "order": order}), losses)
    yield "\n## OBIM: calibration samples of each expert\n\n" + head
    for samples in SAMPLES:
        yield table.row("obim", f"{samples} samples", table.merged("report", "obim", density, samples))
    yield "\n## CABS: its two halves\n\n" + head
    best_setting = table.best("cabs", [{"n": 64, "m": 256, "lambda": factor} for factor in LAMBDAS])
    yield table.row("both: CABS", json.dumps(best_setting), table.merged("report", "cabs", best_setting))
    for name, stages in HALVES.items():
        stages_setting = table.best("pipeline", [[*stages, {"sum": {"weight": factor}}] for factor in LAMBDAS])
        yield table.row(name, json.dumps(stages_setting), table.merged("report", "pipeline", stages_setting))
    yield "\n## CABS: blocks of one density\n\n" + head
    for n, m in BLOCKS:
        setting = {"n": n, "m": m, "lambda": 1}
        yield table.row("cabs", f"{n}:{m}", table.merged("report", "cabs", setting))
    yield "\n## SVC after a merger by its defaults\n\n" + head
    for method in CALIBRATED_BY_SVC:
        yield table.row(method, "without", table.merged("report", method, {}))
        yield table.row(method, "with svc", table.merged("report", "pipeline", [{method: {}}, {"svc": {}}]))
    yield "\n## Outputs that hold each expert\n"
    yield "Each expert as `merger extract` rebuilds it, on its own domain; size as a share of the three checkpoints.\n"
    yield head.replace("share kept", "share kept | size") + "---|"
    for name, parameters in SEVERAL:
        entry = table.several(name, parameters)
        yield f"{table.row(name, json.dumps(parameters), entry['losses'])} {entry['size']:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--select", type=int, default=16)
    parser.add_argument("--report", type=int, default=40)
    args = parser.parse_args()
    table = Table(
        args.zoo.resolve(),
        args.data.resolve(),
        args.out.with_suffix(".jsonl"),
        args.select,
        args.report,
    )
    lines = list(report(table))
    settings = "\n".join(f"- `{method}`: {json.dumps(row)}" for method, row in GRID.items())
    args.out.with_suffix(".md").write_text(
        f"# What merges of a real model keep of its fine-tunes\n\n"
        f"`python scripts/zoo_table.py ZOO DATA --out {args.out.name} "
        f"--select {args.select} --report {args.report}`, "
        f"merger {merger.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()} CPU, {os.cpu_count()} cores. Loss on {args.report} held-out texts a domain "
        f"(first {TOKENS} tokens); each method's setting is the best of its grid on {args.select} other texts.\n\n"
        + "\n".join(lines)
        + f"\n\n## The grid\n\n{settings}\n"
    )


if __name__ == "__main__":
    main()
