"""Everything a user can get wrong: one line that says what and where, an exit code, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, llama, save, trio, write_raw

RECIPE = """\
base: models/base
experts:
  code: models/code
  math: models/math
method: linear
output: {path: out}
"""
Q = "model.layers.0.self_attn.q_proj.weight"
PYTHON = sys.executable
WEIGHTS = "models/code/model.safetensors"
INDEX = "models/code/model.safetensors.index.json"


# --- ways to break things; each is called in the folder of the recipe, and returns more arguments ---


def recipe(text):
    def write():
        Path("recipe.yaml").write_text(text)

    return write


def edit(*changes):
    """The sound recipe with each ``old, new`` pair replaced."""
    text = RECIPE
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    return recipe(text)


def method(name, parameters="{}", more=""):
    return edit("method: linear\n", f"method: {name}\nparameters: {parameters}\n{more}")


def pipeline(*stages, more="seed: 1"):
    return edit("method: linear", "\n  - ".join(["pipeline:", *stages]) + f"\n{more}")


def added(line):
    return recipe(f"{RECIPE}{line}\n")


def output(text):
    return edit("{path: out}", text)


def flags(*arguments):
    return lambda: arguments


def tensors(label, config=CONFIG, **changed):
    """The model ``label`` with some tensors of other values, or left out where that is None."""

    def write():
        new = {**llama(1), **{name.replace("Q", Q): value for name, value in changed.items()}}
        save(f"models/{label}", {name: value for name, value in new.items() if value is not None}, config)

    return write


def value(label, number):
    """One element of a matrix of ``label`` is ``number``."""
    weight = llama(1)[Q].clone()
    weight[2, 1] = number
    return tensors(label, Q=weight)


def header(content, **options):
    return lambda: write_raw(WEIGHTS, content, **options)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def index(**changed):
    """Two shards under an index that says something wrong of them."""

    def write():
        os.unlink(WEIGHTS)
        save("models/code", llama(1), shards=2)
        weight_map = json.loads(Path(INDEX).read_text())["weight_map"]
        changes = {name.replace("Q", Q): file for name, file in changed.items()}
        Path(INDEX).write_text(json.dumps({"weight_map": {**weight_map, **changes}}))

    return write


def file(path, content=""):
    def write():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def appended(path, content):
    def write():
        Path(path).write_bytes(Path(path).read_bytes() + content)

    return write


def gone(path):
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def linked(path, to):
    return lambda: os.symlink(to, path)


def moved(path, to):
    return lambda: os.symlink(Path(path).rename(to), path)


def both(*steps):
    def write():
        return [argument for step in steps for argument in step() or ()]

    return write


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))

# fmt: off
RECIPES = [  # all end in exit code 2
    ("a typo in a key", edit("method:", "metod:"), "recipe.yaml:5: metod: unknown key; did you mean 'method'?"),
    ("a typo in a nested key", output("{path: out, shard_sise: 5GB}"),
        "recipe.yaml:6: output.shard_sise: unknown key; did you mean 'shard_size'?"),
    ("a typo in an expert's key", edit("models/code", "{model: models/code, wieght: 2}"),
        "recipe.yaml:3: experts.code.wieght: unknown key; did you mean 'weight'?"),
    ("a typo in a method", edit("linear", "liner"),
        "recipe.yaml:5: method: there is no method 'liner'; did you mean 'linear'?"),
    ("a typo in a parameter", method("ties", "{densty: 0.5}"),
        "recipe.yaml:6: parameters.densty: unknown key; did you mean 'density'?"),
    ("a typo in a choice", method("ties", "{scope: tensr}"),
        "recipe.yaml:6: parameters.scope: is 'tensr', expected 'tensor', 'row' or 'global'; did you mean 'tensor'?"),
    ("a typo in a score", method("ties", "{score: magnitud}"),
        "recipe.yaml:6: parameters.score: there is no score 'magnitud'; did you mean 'magnitude'?"),
    ("a typo in a score's parameter", method("ties", "{score: {obm: {hesian: none}}}"),
        "recipe.yaml:6: parameters.score.hesian: unknown key; did you mean 'hessian'?"),
    ("a typo in an order", method("im", "{order: {lst: code}}"),
        "recipe.yaml:6: parameters.order.lst: unknown key; did you mean 'last'?"),
    ("a typo in an expert of a map", method("ties", "{density: {code: 0.3, mth: 0.2}}"),
        "recipe.yaml:6: parameters.density: there is no expert 'mth'; did you mean 'math'?"),
    ("a typo in an expert of an order", method("im", "{order: {last: cod}}"),
        "recipe.yaml:6: parameters.order: there is no expert 'cod'; did you mean 'code'?"),
    ("a typo in an expert of a rule", added("rules: [{tensors: norm, use: cod}]"),
        "recipe.yaml:7: rule 1 (tensors: norm): use: there is no expert 'cod'; did you mean 'code'?"),
    ("a typo in a kind", added("rules: [{kinds: [vectr], use: base}]"),
        "recipe.yaml:7: rule 1 (kinds: vectr): kinds 1: is 'vectr'"),
    ("a typo in a stage", pipeline("summ"), "recipe.yaml:6: stage 1: there is no stage 'summ'; did you mean 'sum'?"),
    ("a typo in a tokenizer's model", output("{path: out, tokenizer: cod}"),
        "recipe.yaml:6: output.tokenizer: there is no expert 'cod'; did you mean 'code'?"),
    ("a density above 1", method("ties", "{density: 1.5}"),
        "recipe.yaml:6: parameters.density: is 1.5, expected at most 1"),
    ("a density below 0", method("ties", "{density: {code: -0.1, math: 1}}"),
        "recipe.yaml:6: parameters.density.code: is -0.1, expected at least 0"),
    ("a parameter that is NaN", method("task_arithmetic", "{lambda: .nan}"),
        "recipe.yaml:6: parameters.lambda: expected a finite number, not nan"),
    ("a parameter that is infinite", method("task_arithmetic", "{lambda: -.inf}"),
        "recipe.yaml:6: parameters.lambda: expected a finite number, not -inf"),
    ("a number too large for any float", method("task_arithmetic", "{lambda: 1e99}"),
        "recipe.yaml:6: parameters.lambda: expected a number of at most 1e+30, not 1e99"),
    ("a number that would fill the memory", method("task_arithmetic", "{lambda: 1e999999999}"),
        "recipe.yaml:6: parameters.lambda: expected a number or a fraction such as 1/3, not '1e999999999'"),
    ("a fraction of zero", method("task_arithmetic", "{lambda: 1/0}"),
        "recipe.yaml:6: parameters.lambda: expected a number or a fraction such as 1/3, not '1/0'"),
    ("text for a number", method("task_arithmetic", "{lambda: high}"), "parameters.lambda: expected a number"),
    ("a switch for a number", method("task_arithmetic", "{lambda: yes}"),
        "recipe.yaml:6: parameters.lambda: expected a number or a fraction such as 1/3, not 'yes'"),
    ("text for a switch", method("linear", "{normalize: maybe}"),
        "recipe.yaml:6: parameters.normalize: is 'maybe', expected true or false"),
    ("text for a whole number", added("seed: abc"), "recipe.yaml:7: seed: is 'abc', expected a whole number"),
    ("a negative seed", added("seed: -1"), "recipe.yaml:7: seed: is -1, expected at least 0"),
    ("one value for a map", edit("\n  code: models/code\n  math: models/math", " 3"),
        "recipe.yaml:2: experts: is 3, expected keys and values"),
    ("no experts", edit("\n  code: models/code\n  math: models/math", " {}"),
        "recipe.yaml:2: experts: is {}, expected at least 1 of them"),
    ("no base", edit("base: models/base\n", ""), "recipe.yaml: base: is missing"),
    ("no output path", output("{dtype: float32}"), "recipe.yaml:6: output.path: is missing"),
    ("an expert named base", edit("code:", "base:"), "recipe.yaml:3: experts.base: an expert's name is letters"),
    ("a map that leaves an expert out", method("ties", "{density: {code: 0.3}}"),
        "recipe.yaml:6: parameters.density: has no value for math"),
    ("an order that names one twice", method("im", "{order: [code, code]}"),
        "recipe.yaml:6: parameters.order: has no value for math"),
    ("one expert both first and last", method("im", "{order: {first: code, last: code}}"),
        "recipe.yaml:6: parameters.order: code cannot be both first and last"),
    ("a list over depth of one number", method("ties", "{density: [0.3], scope: tensor}"),
        "recipe.yaml:6: parameters.density: is [0.3], expected at least 2 of them"),
    ("a list over depth in one ranking of all", method("ties", "{density: [0.3, 0.5]}"),
        "recipe.yaml:5: method: scope: global ranks the whole model at once, so density cannot vary over depth"),
    ("an expert's weight by expert", edit("models/code", "{model: models/code, weight: {code: 1}}"),
        "recipe.yaml:3: experts.code.weight: is {'code': 1}, expected a number or a list of them over depth"),
    ("weights that cancel", edit("models/code", "{model: models/code, weight: -1}"),
        "recipe.yaml:5: method: the weights sum to zero, so there is no mean"),
    ("neither method nor pipeline", edit("method: linear\n", ""), "expected a method or a pipeline, found none"),
    ("both method and pipeline", added("pipeline: [sum]"),
        "recipe.yaml:7: pipeline: expected a method or a pipeline, found method and pipeline"),
    ("a rule with two ends", added("rules: [{tensors: norm, use: code, method: linear}]"),
        "recipe.yaml:7: rule 1 (tensors: norm): use: expected one of method, pipeline, use, found method and use"),
    ("a rule about nothing", added("rules: [{use: base}]"),
        "recipe.yaml:7: rule 1: expected tensors: (a regular expression) or kinds:, to say what it is about"),
    ("a broken regular expression", added("rules: [{tensors: '(', use: base}]"),
        "recipe.yaml:7: rule 1 (tensors: (): tensors: is not a regular expression: missing ), unterminated subpattern"),
    ("a pipeline without a merger", pipeline("top: {density: 0.5}"),
        "recipe.yaml:5: pipeline: expected exactly one merger among the stages, found 0; mergers are"),
    ("a pipeline with two mergers", pipeline("sum", "mean"),
        "recipe.yaml:5: pipeline: expected exactly one merger among the stages, found 2; mergers are"),
    ("a sparsifier after the merger", pipeline("sum", "top: {density: 0.5}"),
        "recipe.yaml:5: pipeline: a sparsifier stands after the merger"),
    ("a merger of too few experts", edit("method: linear", "method: model_stock", "  math: models/math\n", ""),
        "model_stock merges at least 2 experts, not 1"),
    ("a filter before the merger", pipeline("consensus", "sum"),
        "recipe.yaml:5: pipeline: a filter stands before the merger"),
    ("a saliency ranked over the whole model", pipeline("obm: {density: 0.5, scope: global}", "sum"),
        "recipe.yaml:5: pipeline: scope: global ranks the whole model at once, but obm depends on"),
    ("a method among the stages", pipeline("ties"),
        "recipe.yaml:6: stage 1: ties is a method; a pipeline is made of stages (`merger methods ties` shows"),
    ("two stages in one", pipeline("{sum: {}, mean: {}}"),
        "recipe.yaml:6: stage 1: expected a stage's name, or {stage: {parameter: value}}"),
    ("parameters beside a pipeline", pipeline("sum", more="parameters: {a: 1}"),
        "recipe.yaml:7: parameters: belongs to a method; in a pipeline each stage has its own"),
    ("slerp of three", edit("  math:", "  third: models/math\n  math:", "linear", "slerp"),
        "recipe.yaml:6: method: slerp merges exactly 2 experts, not 3"),
    ("disjoint shares of more than all", method("im", "{density: 0.6}"),
        "recipe.yaml:5: method: the densities add up to 1.2, but disjoint masks cannot hold more than 1"),
    ("obim without calibration", method("obim"),
        "recipe.yaml:5: method: looks at layer inputs; add `calibration: {data: {code: code.jsonl, math: math.jsonl}}"),
    ("a score of a rule without calibration", added("rules: [{tensors: q, pipeline: [{obm: {density: 0.5}}, sum]}]"),
        "recipe.yaml:7: rule 1 (tensors: q): pipeline: looks at layer inputs; add `calibration: {data: {code: "),
    ("calibration of one expert only", method("obim", more="calibration: {data: {code: code.jsonl}}\n"),
        "recipe.yaml:7: calibration: no data and no stats for math"),
    ("della with no room for its window", method("della", "{density: 0.99}"),
        "recipe.yaml:5: method: drop rates from -0.06 to 0.08 leave [0, 1)"),
    ("a band that leaves nothing", method("breadcrumbs", "{drop_low: 0.9, drop_high: 0.2}"),
        "recipe.yaml:5: method: drop_low 0.9 and drop_high 0.2 leave nothing to keep"),
    ("a size that is none", output("{path: out, shard_size: 5 gigs}"),
        "recipe.yaml:6: output.shard_size: is '5 gigs', expected a size such as 5GB"),
    ("a size of nothing", output("{path: out, shard_size: 0}"),
        "recipe.yaml:6: output.shard_size: is 0, expected at least 1"),
    ("a dtype by another name", output("{path: out, dtype: bf16}"),
        "recipe.yaml:6: output.dtype: is 'bf16', expected 'float64', 'float32', 'bfloat16' or 'float16'; did"),
    ("a path that no disk takes", output(f"{{path: {'o' * 300}}}"), "which no folder can be named"),
    ("a path with a zero byte", output(r'{path: "a\0b"}'), r"recipe.yaml:6: output.path: is 'a\x00b', which no folder"),
    ("the home of nobody", output("{path: ~nobody-here/out}"), "output.path: there is no home folder ~nobody-here"),
    ("an unknown key of the name of a form of numbers", added("auto: 1"), "recipe.yaml:7: auto: unknown key; choose"),
    ("an unknown key of the name of a type", added("'dict[': 1"), "recipe.yaml:7: dict[: unknown key; choose from"),
    ("a key that would clear the terminal", added(r'"\x1b[2J\n": 1'),
        r"recipe.yaml:7: \x1b[2J\n: unknown key; choose from"),
    ("a key twice", added("method: ties"), "recipe.yaml:7: method: stands here a second time"),
    ("a key that is a number", added("7: x"), "recipe.yaml:7: 7: unknown key; choose from base, calibration"),
    ("anchors that explode", recipe(BOMB), "recipe.yaml: its anchors expand to more than 20,000 values"),
    ("an anchor within itself", recipe("base: &a [*a]\n"), "recipe.yaml: nested more than 50 levels deep"),
    ("nesting without end", added("seed: " + "[" * 500 + "]" * 500), "recipe.yaml: nested more than 50 levels deep"),
    ("a YAML tag that runs code", edit("linear", "!!python/object/apply:os.system [touch pwned]"),
        "recipe.yaml:5: not valid YAML: could not determine a constructor for the tag"),
    ("broken YAML", added("rules: [{tensors: x"), "recipe.yaml:8: not valid YAML: expected ',' or '}'"),
    ("a tab in YAML", recipe("base:\n\tmodel: x\n"), "recipe.yaml:2: not valid YAML: found character '\\t'"),
    ("two documents", added("---\na: 1"), "recipe.yaml:7: holds several documents, expected one"),
    ("a date", added("seed: 2020-13-45"), "recipe.yaml:7: seed: is '2020-13-45', expected a whole number"),
    ("an empty file", recipe(""), "recipe.yaml: experts: is missing"),
    ("a list", recipe("- a\n"), "recipe.yaml: expected keys and values (base:, experts:, ...), not list"),
    ("no file", gone("recipe.yaml"), "recipe.yaml: there is no such file"),
    ("a folder", both(gone("recipe.yaml"), lambda: os.mkdir("recipe.yaml")),
        "recipe.yaml: is a folder, expected a recipe; merger inspect and merger verify look at models"),
    ("bytes that are no text", file("recipe.yaml", b"\xff\xfe\x00"),
        "recipe.yaml: cannot be read: it is not UTF-8 text"),
    ("a zero byte in the text", file("recipe.yaml", b"a: \0"), "recipe.yaml: not valid YAML: unacceptable character"),
    ("a file too large", file("recipe.yaml", b"#" * (2 << 20)),
        "recipe.yaml: is 2,097,152 bytes; a recipe is a page of YAML"),
    ("--set without =", flags("--set", "seed"), "--set seed: expected key.path=value"),
    ("--set of an unknown key", flags("--set", "sed=3"), "recipe.yaml: sed: unknown key; did you mean 'seed'?"),
    ("--set of a wrong value", flags("--set", "method=liner"), "recipe.yaml:5: method: there is no method 'liner'"),
    ("--set beyond a list", both(added("rules: [{tensors: a, use: base}]"), flags("--set", "rules.3.use=code")),
        "--set rules.3.use=code: there is no 3 in the list, which is counted from 0"),
    ("--set of endless nesting", flags("--set", "seed=" + "[" * 500), "--set seed: nested more than 50 levels deep"),
    ("--device by another name", flags("--device", "gpu"), "--device gpu: expected auto, cpu, cuda or cuda:0"),
    ("--max-memory that is no size", flags("--max-memory", "lots"), "--max-memory lots: expected a size such as 800MB"),
    ("an unknown flag", flags("--frce"), "No such option: --frce"),
    ("the output is an input", both(output("{path: models/base}"), flags("--force")),
        "models/base is, holds or lies in the input"),
    ("the output lies in an input", output("{path: models/code/out}"),
        "models/code/out is, holds or lies in the input"),
    ("the output lies in what an input is a link to",
        both(moved("models", "../elsewhere"), output("{path: ../elsewhere/code/out}")),
        "elsewhere/code/out is, holds or lies in the input"),
    ("an input lies in the output", output("{path: models}"), "models is, holds or lies in the input"),
    ("the output is a link to an input", both(linked("out", "models/math"), flags("--force")),
        "out is, holds or lies in the input"),
    ("the output is an adapter",
        both(edit("models/code", "{model: models/code, adapter: lora}", "{path: out}", "{path: lora}"),
        file("lora/adapter_config.json"), flags("--force")), "lora is, holds or lies in the input"),
    ("the output holds the data", both(method("obim", more="calibration: {data: out/text.jsonl}\n"),
        file("out/text.jsonl"), flags("--force")), "out is or holds"),
    ("the output holds the recipe", both(moved("models", "../elsewhere"), output("{path: .}"), flags("--force")),
        "is or holds"),
    ("the output is occupied", file("out/anything"),
        "out is there already; choose another folder, or replace it with --force"),
    ("the output is a file", file("out"), "out is there already; choose another folder, or replace it with --force"),
    ("someone's folder beside the output", file("out.partial/precious"),
        "out.partial: is there already, and no run of merger left it; move it away"),
    ("a link beside the output", both(file("precious/one"), linked("out.partial", "precious")),
        "out.partial: is there already, and no run of merger left it; move it away"),
]
CHECKPOINTS = [  # all end in exit code 3
    ("NaN in the base", value("base", float("nan")), f"base: {Q} holds NaN or infinity"),
    ("NaN in an expert", value("math", float("nan")), f"math: {Q} holds NaN or infinity"),
    ("infinity in an expert", value("code", -float("inf")), f"code: {Q} holds NaN or infinity"),
    ("NaN in a row that only one expert has", tensors("code", **{
        "lm_head.weight": torch.full((9, 4), float("nan")), "model.embed_tokens.weight": torch.ones(9, 4)}),
        "code: lm_head.weight holds NaN or infinity"),
    ("a merge that overflows", both(value("code", 1e6), output("{path: out, dtype: float16}")),
        f"{Q}: the merged values overflow F16; lower lambda or the weights, or set output.dtype: float32"),
    ("a copy that overflows", both(value("code", 1e6), output("{path: out, dtype: float16}"),
        flags("--set", "rules=[{tensors: q_proj, use: code}]")), f"{Q}: the merged values overflow F16"),
    ("a truncated file", lambda: os.truncate(WEIGHTS, os.path.getsize(WEIGHTS) - 10),
        f"{WEIGHTS}: its header is broken: the file is truncated"),
    ("a file that ends in its header", lambda: os.truncate(WEIGHTS, 100), f"{WEIGHTS}: its header claims"),
    ("an empty weight file", lambda: os.truncate(WEIGHTS, 0),
        f"{WEIGHTS}: is 0 bytes, too short for a safetensors file"),
    ("a file longer than its tensors", appended(WEIGHTS, b"x"),
        f"{WEIGHTS}: its header is broken: the file is longer than its tensors"),
    ("a header longer than the file", header({}, length=5000),
        f"{WEIGHTS}: its header claims 5,000 bytes but the file has 10"),
    ("a header longer than any", header({}, length=1 << 60), "more than the format allows"),
    ("a header that is no JSON", header(b'{"a": '), f"{WEIGHTS}: its header is broken: Expecting value"),
    ("a header that is no object", header([1]), f"{WEIGHTS}: its header is broken: it is no JSON object"),
    ("a header that names nothing", header({}), "models/code: its weights hold no tensor"),
    ("tensors that overlap", header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, size=12),
        f"{WEIGHTS}: its header is broken: b overlaps the one before it"),
    ("a gap between tensors", header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, size=20),
        f"{WEIGHTS}: its header is broken: b leaves a gap before it"),
    ("offsets that are not the shape's", header({"a": entry("F32", [3], 0, 8)}, size=8),
        f"{WEIGHTS}: its header is broken: F32 [3] does not take the 8 bytes"),
    ("a negative shape", header({"a": entry("F32", [-2], 0, 8)}, size=8),
        f"{WEIGHTS}: its header is broken: shape and"),
    ("an unknown dtype", header({"a": entry("Q4_K", [2], 0, 8)}, size=8),
        f"{WEIGHTS}: its header is broken: the dtype 'Q4_K' is unknown"),
    ("a name twice in a header", header(b'{"a": 1, "a": 2}'),
        f"{WEIGHTS}: its header is broken: a name stands in it twice"),
    ("a Git LFS pointer", file(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:4d"), WEIGHTS),
    ("an index that names a missing file", index(Q="model-9.safetensors"),
        f"{INDEX}: names 'model-9.safetensors', which is missing"),
    ("an index that leads out of the folder", index(Q="../../math/model.safetensors"),
        f"{INDEX}: names '../../math/model.safetensors', which is not a file in its folder"),
    ("an index with an absolute path", index(Q="/etc/passwd"),
        f"{INDEX}: names '/etc/passwd', which is not a file in its folder"),
    ("an index that promises a tensor", index(extra="model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors: has no tensor extra, which the index says it holds"),
    ("an index without its map", both(gone(WEIGHTS), file(INDEX, "{}")), f"{INDEX}: has no weight_map"),
    ("another shape", tensors("code", Q=torch.ones(4, 5)), f"code: {Q} is [4, 5], but [4, 4] in base"),
    ("another number of axes", tensors("math", Q=torch.ones(16)), f"math: {Q} is [16], but [4, 4] in base"),
    ("a missing tensor", tensors("code", Q=None), f"code: has no {Q}; set `missing: zero`"),
    ("an extra tensor", tensors("code", extra=torch.ones(3)),
        "code: has extra, which the base lacks; leave it out with a rule {tensors: '^extra$', use: base}"),
    ("a rule that takes what is not there",
        both(tensors("code", Q=None), added("rules: [{tensors: q_proj, use: code}]")),
        f"code: has no {Q}, which rule 1 takes from it"),
    ("whole numbers for floats", tensors("code", Q=torch.ones(4, 4, dtype=torch.int32)),
        f"code: is quantised ({Q} is I32); merge the 16- or 32-bit"),
    ("fp8", tensors("math", Q=torch.ones(4, 4).to(torch.float8_e4m3fn)),
        f"math: {Q} is F8_E4M3 and has no scale"),
    ("GPTQ by its config", tensors("code", {**CONFIG, "quantization_config": {"quant_method": "gptq"}}),
        "code: is quantised (config.json names quantization_config gptq); merge the 16- or 32-bit"),
    ("GPTQ by its tensors", tensors("code", **{"a.qweight": torch.ones(2, 2, dtype=torch.int32)}),
        "code: is quantised (it has a.qweight)"),
    ("no config", gone("models/code/config.json"), "models/code has no config.json"),
    ("a config that is no JSON", file("models/math/config.json", "{"), "models/math/config.json: is not valid JSON"),
    ("a config that is no object", file("models/math/config.json", "[]"),
        "models/math/config.json: expected a JSON object"),
    ("no weights", gone(WEIGHTS), "models/code has no model.safetensors or pytorch_model.bin"),
    ("weights of another form", both(gone(WEIGHTS), file("models/code/model.gguf")),
        "models/code holds model.gguf, weights in GGUF"),
    ("a pickle that runs code",
        both(gone(WEIGHTS), file("models/code/pytorch_model.bin", b"cposix\nsystem\n(S'touch pwned'\ntR.")),
        "models/code/pytorch_model.bin"),
    ("no such folder", edit("models/code", "./nowhere"), "code: there is no folder"),
    ("a file for a folder", both(gone("models/code"), file("models/code")),
        "recipe.yaml:3: experts.code: models/code: is a file, expected the folder of a model"),
    ("an adapter for a model", both(gone(WEIGHTS), file("models/code/adapter_config.json", "{}")),
        "code: models/code is a PEFT adapter, not a model"),
    ("statistics that are not there",
        method("obim", more="calibration: {stats: {code: code.stats, math: math.stats}}\n"),
        "recipe.yaml:7: calibration.stats.code: there is no file code.stats"),
    ("a name that no repository has", both(edit("models/code", "x" * 200), flags("--offline")),
        "is neither a folder nor org/name[@revision]"),
    ("a model that is not in the cache", both(edit("models/code", "org/not-here"), flags("--offline")),
        "code: org/not-here is neither a folder nor in the Hub cache"),
]
RESOURCES = [  # all end in exit code 4
    ("no CUDA", flags("--device", "cuda:99"), "--device cuda:99: this machine has"),
    ("too little memory", flags("--max-memory", "1MB"),
        "--max-memory: 1,000,000 bytes are too little; this merge needs about"),
    ("an output below a file", both(file("plain"), output("{path: plain/out}")),
        "plain/out.partial: cannot be made: Not a directory"),
    ("an output that no disk holds", output("{path: /proc/out}"), "/proc/out"),
]
# fmt: on
ROWS = [(code, *row) for code, rows in ((2, RECIPES), (3, CHECKPOINTS), (4, RESOURCES)) for row in rows]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a sound recipe and its models; the current one."""
    work_folder = tmp_path / "here"
    work_folder.mkdir()
    monkeypatch.chdir(work_folder)
    trio("models")
    recipe(RECIPE)()
    return work_folder


def everything(folder):
    return sorted((str(path), path.is_symlink() or path.is_dir() or path.read_bytes()) for path in folder.rglob("*"))


@pytest.mark.parametrize(("code", "break_it", "message"), [pytest.param(c, b, m, id=label) for c, label, b, m in ROWS])
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_left(merger, folder, code, break_it, message):
    options = break_it() or ()
    contents_before = everything(folder.parent)

    ran = merger("run", "recipe.yaml", *options)

    assert ran.code == code
    assert any(message in line for line in ran.err.splitlines()), ran.err
    assert "Usage:" in ran.err or all(line.startswith(("error: ", "note: ")) for line in ran.err.splitlines())
    assert "Traceback" not in ran.err + ran.out
    assert ran.out == ""
    assert everything(folder.parent) == contents_before


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("code", "break_it", "message"),
    [
        pytest.param(2, edit("linear", "liner"), "error: recipe.yaml:5: method: there is no method", id="recipe"),
        pytest.param(3, tensors("code", Q=torch.ones(4, 5)), f"error: code: {Q} is [4, 5]", id="checkpoint"),
        pytest.param(4, flags("--max-memory", "1MB"), "error: --max-memory: 1,000,000 bytes", id="resource"),
    ],
)
def test_a_process_of_its_own_ends_in_the_same_code(folder, command, code, break_it, message):
    options = break_it() or ()
    contents_before = everything(folder)

    ran = subprocess.run([PYTHON, "-m", "merger", command, "recipe.yaml", *options], capture_output=True, text=True)

    assert ran.returncode == code
    assert ran.stderr.startswith(message)
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stdout == ""
    assert everything(folder) == contents_before


def test_the_same_recipe_unbroken_merges(merger, folder):
    assert merger("run", "recipe.yaml").code == 0
    assert (folder / "out" / "model.safetensors").is_file()
