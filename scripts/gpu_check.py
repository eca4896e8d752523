"""The parts of scripts/gpu_check.sh: each runs as a process of its own, with a limit, and leaves OUT/PART.json.

A part that is there already is not run again. What fails or takes too long is told on the page and tried again by the
next run. OUT/page.md is written after every part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_parts
import gpu_profile

HERE = Path(__file__).parent
RESERVE = 15
"""Seconds that are left for the page and for removing the models."""


@dataclass(frozen=True)
class Part:
    """One question."""

    name: str
    limit: int  # seconds, of eight minutes together
    run: Callable[[gpu_parts.Setting], dict[str, Any]]
    question: str
    needs: str = "environment"  # the part without which this one has nothing to look at


PARTS = [
    Part("environment", 60, gpu_parts.environment, "what is there, and what does a CUDA context take"),
    Part("tests", 90, gpu_parts.tests, "do the tests that need a GPU pass"),
    Part("bytes", 150, gpu_parts.bytes_of_all, "are the bytes of CPU and device the same"),
    Part("models", 90, gpu_parts.models, "how many blocks of the model fit"),
    Part("floor", 60, gpu_parts.floor, "reading the inputs and writing the output, nothing else", "models"),
    Part("calibration", 90, gpu_parts.calibration, "100 samples of 512 tokens through each expert", "models"),
    *(Part(name, 90, partial(gpu_parts.merged, name=name), f"a merge: {name}", "models") for name in gpu_parts.MERGES),
    Part("profile", 90, gpu_profile.profile, "where the slowest merge spends its time", "linear"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="7B")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument(
        "--work", type=Path, default=Path("/dev/shm"), help="where the models go, in a folder of their own"
    )
    parser.add_argument("--keep", action="store_true", help="leave the models where they are")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    setting = gpu_parts.Setting(args.out.resolve(), args.work / "merger-gpu-check", args.device, args.size)
    if args.part:
        print(json.dumps(next(part.run(setting) for part in PARTS if part.name == args.part)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    failures = run_all(setting, args.minutes)
    if not args.keep and not failures:
        shutil.rmtree(setting.work, ignore_errors=True)
    print((args.out / "page.md").read_text())
    sys.exit(1 if failures else 0)


def run_all(setting: gpu_parts.Setting, minutes: float) -> dict[str, str]:
    """Runs the missing parts while there is time; why some were not answered, by part."""
    end = time.monotonic() + 60 * minutes - RESERVE
    failures: dict[str, str] = {}
    for part in PARTS:
        seconds_left = end - time.monotonic()
        if not _must_run(part, setting):
            continue
        if part.needs != part.name and setting.answer(part.needs) is None:
            failures[part.name] = f"waits for {part.needs}"
        elif seconds_left < RESERVE:
            failures[part.name] = "no time was left; run it again"
        else:
            print(f"{part.name}: {part.question}?", flush=True)
            failures |= run_part(part, setting, min(part.limit * minutes / 8, seconds_left))
        (setting.answers / "page.md").write_text(page(setting, failures))
    return failures


def _must_run(part: Part, setting: gpu_parts.Setting) -> bool:
    """Whether a part has no answer, or made models that a missing part needs and that another machine had."""
    if setting.answer(part.name) is None:
        return True
    waiting = any(setting.answer(later_part.name) is None for later_part in PARTS[PARTS.index(part) + 1 :])
    return part.name == "models" and waiting and not (setting.work / "models").exists()


def run_part(part: Part, setting: gpu_parts.Setting, seconds: float) -> dict[str, str]:
    """Runs one part as a process; nothing, or why it has no answer."""
    command = [sys.executable, __file__, str(setting.answers), "--part", part.name, "--device", setting.device]
    command += ["--size", setting.size, "--work", str(setting.work.parent)]
    log = setting.answers / f"{part.name.replace(' ', '-')}.log"
    began = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the part's own processes, which are a group
            process.communicate()
            return {part.name: f"took longer than {seconds:.0f} s"}
    if process.returncode:
        return {part.name: f"exit {process.returncode}: {_last_line(log)}"}
    answer = {**json.loads(output.splitlines()[-1]), "part seconds": round(time.monotonic() - began, 1)}
    setting.file(part.name).write_text(json.dumps(answer, indent=1) + "\n")
    return {}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def page(setting: gpu_parts.Setting, failures: dict[str, str]) -> str:
    """What is known so far, as Markdown."""
    answers = {part.name: setting.answer(part.name) for part in PARTS}
    seconds = sum(answer["part seconds"] for answer in answers.values() if answer is not None)
    lines = [f"# GPU check: {setting.device}, {setting.size}", "", f"All parts together took {seconds:.0f} s.", ""]
    for part in PARTS:
        answer = answers[part.name]
        if answer is None and part.name not in failures:
            continue
        lines += [f"## {part.name}", "", f"{part.question[0].upper()}{part.question[1:]}?", ""]
        lines += [
            f"- {key}: {_text(value)}" for key, value in (answer or {"not answered": failures[part.name]}).items()
        ]
        lines.append("")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "".join(f"\n    - {item}" for item in value) or "none"
    return f"{value:,}" if type(value) is int else str(value)


if __name__ == "__main__":
    main()
