"""The command line, run as a subprocess: what people and scripts see."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from laid import laid

import cfmerge
from cfmerge.recipe import load as load_recipe

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model, llama):
    """A directory with base, e1, e2, e3, and `files`, its contents."""
    folder = tmp_path_factory.mktemp("cli")
    for number, name in enumerate(("base", "e1", "e2", "e3")):
        make_model(folder / name, llama(number))
    return folder


@pytest.fixture
def cli(models):
    """`cli(*arguments)` runs `python -m cfmerge` beside the models: `.code`, `.out`, `.err`."""

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "cfmerge", *map(str, arguments)],
            cwd=models, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)

    return run


EXPERTS = ("-e", "e1", "-e", "e2", "-e", "e3")


def test_importing_is_light():
    """Neither `import cfmerge` nor `--help` imports JAX, torch, transformers or what draws pages."""
    script = """
import sys, cfmerge
def heavy():
    names = {"jax", "jaxlib", "flax", "torch", "transformers", "orbax", "matplotlib", "jinja2"}
    return sorted(names & set(sys.modules))
assert not heavy(), heavy()
assert "merge_params" in dir(cfmerge) and cfmerge.__version__
from cfmerge.cli import main
for arguments in (["--help"], ["merge", "--help"], ["--version"]):
    sys.argv = ["cfmerge", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    assert not heavy(), (arguments, heavy())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"cfmerge {cfmerge.__version__}" in done.stdout


def test_merging_does_not_import_torch(models, tmp_path):
    script = (
        "import sys, cfmerge\n"
        "cfmerge.merge('base', ['e1', 'e2'], 'average', output=sys.argv[1])\n"
        "heavy = {'torch', 'transformers', 'flax', 'orbax', 'matplotlib', 'jinja2', 'scipy.optimize'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out"], cwd=models, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_help_and_version(cli):
    for option in ("-h", "--help"):
        done = cli(option)
        assert done.code == 0
        for command in ("merge", "plan", "inspect", "methods", "demo"):
            assert command in done.out
    assert cli("--version").out.strip() == f"cfmerge {cfmerge.__version__}"


def test_merge(cli, models, tmp_path, contents):
    """What the command line makes is what the Python call makes; no progress where there is no terminal."""
    done = cli("merge", "--base", "base", *EXPERTS, "-m", "task_arithmetic", "-p", "scale=2.5e-1", "-o", tmp_path / "a")
    assert (done.code, done.err) == (0, "")
    assert "task_arithmetic" in done.out
    assert str(tmp_path / "a") in done.out
    assert "\x1b" not in done.out
    result = cfmerge.merge(
        models / "base", [models / f"e{n}" for n in (1, 2, 3)], "task_arithmetic", parameters={"scale": 0.25},
        output=tmp_path / "b",
    )  # fmt: skip
    assert result.plan.method.parameters == {"scale": 0.25, "normalise": False}
    assert contents(tmp_path / "a")["model.safetensors"] == contents(tmp_path / "b")["model.safetensors"]


def test_merge_with_ace_by_default(cli, tmp_path):
    parameters = ("-p", "eps=1e-5", "-p", "gate=log_variance")
    done = cli("merge", "--base", "base", *EXPERTS, *parameters, "-q", "-o", tmp_path / "a")
    assert (done.code, done.out, done.err) == (0, "", "")
    recipe = load_recipe(tmp_path / "a/README.md")
    assert recipe.method == "ace"
    assert recipe.parameters["eps"] == 1e-5
    assert recipe.parameters["gate"] == "log_variance"


def test_names_and_weights_of_experts(cli, models, tmp_path):
    """PATH, NAME=PATH, NAME=PATH@WEIGHT, PATH@WEIGHT; a path with = or @ in it is a path."""
    odd = models / "a=b@2"
    odd.symlink_to("e3")
    experts = ["-e", "maths=e1", "-e", "code=e2@0.5", "-e", "a=b@2"]
    done = cli("merge", "--base", "base", *experts, "-m", "average", "--json", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    found = [(e.name, e.path, e.weight) for e in load_recipe(tmp_path / "out/README.md").resolved_experts()]
    assert found == [("maths", "e1", 1.0), ("code", "e2", 0.5), ("e3", "a=b@2", 1.0)]
    done = cli("plan", "--base", "base", "-e", "e1@2", "-e", "e2", "-m", "average")
    assert "e1 (x2), e2" in done.out


def test_merge_a_recipe(cli, models, tmp_path, load):
    recipe = {
        "base": "base", "experts": ["e1", {"path": "e2", "name": "second", "weight": 3}], "method": "average",
        "rules": [{"match": Q, "method": "keep-base"}], "dtype": "float16",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = cli("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    found, base, one, two = (load(path) for path in (tmp_path / "out", *(models / n for n in ("base", "e1", "e2"))))
    assert found[Q].dtype == np.float16
    assert np.array_equal(found[Q], base[Q].astype(np.float16))
    name = "model.norm.weight"
    np.testing.assert_allclose(found[name], (one[name] + 3 * two[name]) / 4, rtol=1e-3)


def test_the_command_line_goes_over_the_recipe(cli, tmp_path):
    recipe = {"base": "elsewhere", "experts": ["e1", "e2"], "method": "ace", "parameters": {"tau": 0.5}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = cli("plan", tmp_path / "recipe.yaml", "--base", "base", "-p", "eps=2e-5", "--json")
    told = json.loads(done.out)
    assert (told["parameters"]["tau"], told["parameters"]["eps"]) == (0.5, 2e-5)
    done = cli("plan", tmp_path / "recipe.yaml", "--base", "base", "-m", "average", "--json")
    assert json.loads(done.out)["parameters"] == {}


def test_a_rule_on_the_command_line(cli, models, tmp_path, load):
    """It wins over the file's, and the card repeats it."""
    recipe = {"base": "base", "experts": ["e1", "e2"], "method": "average"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "rules": [{"match": "*", "method": "average"}]}))
    rule = f"match={Q}, method=keep-base"
    assert cli("merge", tmp_path / "recipe.yaml", "--rule", rule, "-q", "-o", tmp_path / "out").code == 0
    assert np.array_equal(load(tmp_path / "out")[Q], load(models / "base")[Q])
    assert cli("merge", tmp_path / "out/README.md", "-q", "-o", tmp_path / "again").code == 0
    assert np.array_equal(load(tmp_path / "again")[Q], load(models / "base")[Q])
    told = json.loads(cli("plan", tmp_path / "recipe.yaml", "--rule", rule, "--json").out)
    assert {row["what"] for row in told["tensors"] if row["name"] == Q} == {"keep-base"}
    methods = ("-m", "average", "-m", "task_arithmetic", "-p", "scale=0.5", "-r", rule)
    assert (
        cli("sweep", tmp_path / "recipe.yaml", *methods, "-q", "-o", tmp_path / "runs").code == 1
    )  # average: no scale
    assert cli("sweep", tmp_path / "recipe.yaml", *methods[2:], "-q", "-o", tmp_path / "runs").code == 0
    assert np.array_equal(load(tmp_path / "runs/task_arithmetic")[Q], load(models / "base")[Q])
    assert cli("accumulate", tmp_path / "recipe.yaml", "--rule", rule, "-q", "-o", tmp_path / "stats").code == 0
    assert Q not in cfmerge.Statistics.load(tmp_path / "stats").kinds


def test_json_of_a_merge(cli, models, tmp_path, contents):
    done = cli("merge", "--base", "base", *EXPERTS, "-m", "average", "--json", "-o", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    events = [json.loads(line) for line in done.out.splitlines()]
    assert [event["event"] for event in events[:-1]] == ["progress"] * (len(events) - 1)
    assert len(events) > 2
    shares = [event["bytes"] for event in events[:-1]]
    assert shares == sorted(shares)
    assert shares[-1] == events[0]["total"]
    last = events[-1]
    assert last["event"] == "done"
    assert last["output"] == str(tmp_path / "out")
    assert last["experts"] == ["e1", "e2", "e3"]
    assert last["versions"]["cfmerge"] == cfmerge.__version__
    assert contents(models)["base/model.safetensors"] in last["sha256"].values()
    assert sum(row["tensors"] for row in last["counts"]) == 11


def test_progress_in_a_terminal(models, tmp_path):
    """Names and a bar on the terminal, the summary alone on stdout."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cfmerge", "merge", "--base", "base", *EXPERTS, "-m", "average", "-o", tmp_path]
    options = {"cwd": models, "env": os.environ | {"TERM": "xterm"}}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, **options) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", 0) as terminal:  # OSError: closed at the other end
            while block := terminal.read(4096):
                shown += block
        out = process.stdout.read().decode()
    assert process.returncode == 0
    assert "merged by average" in out
    assert "\x1b" not in out
    assert b"weight" in shown
    assert b"kB" in shown or b"bytes" in shown


def test_devices_do_not_change_the_result(cli, models, contents):
    """The processor as two devices: no recipe and no card tells of it."""
    for number in (1, 2):
        command = ("--base", "base", *EXPERTS, "-m", "average", "--devices", number)
        assert cli("merge", *command, "-o", f"on{number}").code == 0
    assert contents(models / "on1") == contents(models / "on2")


def test_plan(cli, models, contents):
    before = contents(models)
    done = cli("plan", "--base", "base", *EXPERTS)
    assert done.code == 0
    for text in ("ace", "eps_rel=", "matrix", "embedding", "average", "largest working set", "e1, e2, e3"):
        assert text in done.out
    assert Q not in done.out
    assert Q in cli("plan", "--base", "base", *EXPERTS, "--tensors").out
    assert "too large" in cli("plan", "--base", "base", *EXPERTS, "--memory", "1kB").out
    assert contents(models) == before


def test_plan_reads_headers_only(cli, models, make_model, tmp_path, llama):
    """Contents that a merge refuses do not trouble a plan."""
    spoiled = make_model(tmp_path / "nan", {name: t * np.float32(np.nan) for name, t in llama().items()})
    assert cli("plan", "--base", "base", "-e", "e1", "-e", spoiled).code == 0


def test_json_of_a_plan(cli):
    told = json.loads(cli("plan", "--base", "base", *EXPERTS, "--json").out)
    assert told["method"] == "ace"
    assert told["bytes_read"] == 4 * told["bytes_written"]
    row = next(row for row in told["tensors"] if row["name"] == Q)
    assert (row["kind"], row["layout"], row["shape"], row["what"]) == ("matrix", "(out, in)", [8, 8], "ace")


def test_plan_predicts_seconds_and_memory(cli):
    """On this machine, once it was measured; and for devices that are not here, whose speed nobody knows."""
    assert "on this machine" in cli("plan", "--base", "base", *EXPERTS).out
    told = json.loads(cli("plan", "--base", "base", *EXPERTS, "--json", "--no-calibration").out)["prediction"]
    assert told["seconds"] is None
    assert told["memory"] > 1e8
    there = cli("plan", "--base", "base", *EXPERTS, "--devices", 8, "--device-memory", "1kB").out
    for text in ("8 devices of 1.0 kB", "larger devices"):
        assert text in there
    assert "on this machine" not in there


def test_inspect(cli, models, make_model, tmp_path, llama, llama_config):
    tied = make_model(tmp_path / "tied", llama(), llama_config | {"tie_word_embeddings": True}, shards=2)
    done = cli("inspect", tied)
    assert done.code == 0
    for text in (Q, "matrix", "(out, in)", "float32", "model-00002-of-00002.safetensors", "llama", "11 tensors"):
        assert text in done.out
    assert "tied: lm_head.weight = model.embed_tokens.weight (stored too)" in done.out
    told = json.loads(cli("inspect", models / "base/model.safetensors", "--json").out)
    assert told["files"] == ["model.safetensors"]
    assert told["ties"] == {}
    assert told["parameters"] * 4 == told["bytes"]
    assert {row["name"] for row in told["tensors"]} == set(llama())


def test_inspect_tells_of_ties_that_are_not_stored(cli, make_model, tmp_path, llama, llama_config):
    tensors = {name: tensor for name, tensor in llama().items() if name != "lm_head.weight"}
    path = make_model(tmp_path / "tied", tensors, llama_config | {"tie_word_embeddings": True})
    assert "tied: lm_head.weight = model.embed_tokens.weight (not stored)" in cli("inspect", path).out


def test_inspect_shows_an_adapter_and_notes(cli, tmp_path):
    pairs = {f"base_model.model.q.lora_{one}.weight": np.ones((2, 2), np.float32) for one in "AB"}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/tiny"}
    adapter = laid(tmp_path / "a", {"adapter_model.safetensors": pairs, "adapter_config.json": config})
    for path in (adapter, adapter / "adapter_model.safetensors"):
        done = cli("inspect", path)
        assert done.code == 0
        assert "adapter (LORA, rank 2, alpha 4) of org/tiny, 2 tensors" in done.out
    (adapter / "adapter_model.safetensors").unlink()
    assert "and no adapter_model.safetensors (or .bin); fetch the adapter again" in cli("inspect", adapter).err
    noted = laid(tmp_path / "m", {"model.safetensors": pairs, "other.safetensors": pairs})
    assert "note: " in cli("inspect", noted).out
    assert json.loads(cli("inspect", noted, "--json").out)["notes"]


def test_inspect_tells_what_of_a_file_is_not_read(cli, tmp_path):
    state = {"params/dense/kernel": np.ones((2, 3), np.float32), "opt_state/mu": np.ones(3, np.float32)}
    cfmerge.save(state, tmp_path / "state.npz")
    done = cli("inspect", tmp_path / "state.npz")
    assert "note: " in done.out
    assert "opt_state" in done.out
    assert json.loads(cli("inspect", tmp_path / "state.npz", "--json").out)["notes"]


def test_adapters_are_written_with_their_own_size(cli, models, tmp_path):
    made = cli("merge", "--base", "base", *EXPERTS, "-m", "average", "--adapter-out", 1, "-r", "match=*embed*,"
               "method=keep-base", "-r", "match=*norm*,method=keep-base", "-r", "match=lm_head*,method=keep-base",
               "-o", tmp_path / "a", "--json")  # fmt: skip
    told = json.loads(made.out.splitlines()[-1])
    assert told["bytes_written"] == (tmp_path / "a/adapter_model.safetensors").stat().st_size


def test_methods(cli):
    everything = cli("methods").out
    for name in ("ace", "average", "task_arithmetic", "trim", "eps_rel"):
        assert name in everything
    one = cli("methods", "ace").out
    assert "2603.02945" in one
    assert "task_arithmetic" not in one
    told = json.loads(cli("methods", "--json").out)
    assert [entry["name"] for entry in told] == sorted(cfmerge.methods.registry())
    for entry in told:
        assert entry["summary"]
        assert entry["source"]
        assert entry["kind"] in {"method", "transform"}
        assert all(parameter["doc"] for parameter in entry["parameters"].values()), entry
    done = cli("methods", "acee")
    assert done.code == 1
    assert "did you mean 'ace'" in done.err


WRONG = {
    "unknown key of a rule": (["plan", "--base", "base", *EXPERTS, "-r", "match=*, metod=average"], 1, "'method'"),
    "rule without a key": (["plan", "--base", "base", *EXPERTS, "-r", "*.q_proj.*"], 1, "is not KEY=VALUE"),
    "rule for nothing": (["plan", "--base", "base", *EXPERTS, "-r", "match=x, method=average"], 1, "is never used"),
    "no base": (["merge", "-e", "e1", "-e", "e2", "-o", "out"], 1, "--base"),
    "no experts": (["merge", "--base", "base", "-o", "out"], 1, "--expert"),
    "no output": (["merge", "--base", "base", *EXPERTS], 2, "--output"),
    "missing model": (["merge", "--base", "base", "-e", "e1", "-e", "e9", "-o", "out"], 1, "e9: no such file"),
    "parameter without a value": (["merge", "--base", "base", *EXPERTS, "-p", "eps", "-o", "out"], 1, "KEY=VALUE"),
    "unknown method": (["merge", "--base", "base", *EXPERTS, "-m", "acee", "-o", "out"], 1, "did you mean 'ace'"),
    "unknown option": (["merge", "--base", "base", *EXPERTS, "--methd", "ace", "-o", "out"], 2, "--methd"),
    "unknown choice": (["merge", "--base", "base", *EXPERTS, "--heads", "all", "-o", "out"], 2, "keep-base"),
    "unknown leave": (["merge", "--base", "base", *EXPERTS, "--allow", "all", "-o", "out"], 1, "allow"),
    "bad memory": (["merge", "--base", "base", *EXPERTS, "--memory", "lots", "-o", "out"], 1, "not a size"),
    "no devices": (
        ["sweep", "--base", "base", *EXPERTS, "-m", "average", "--devices", "0", "-o", "out"],
        1,
        "found '0'",
    ),
    "odd devices": (["accumulate", "--base", "base", *EXPERTS, "--devices", "gpu", "-o", "out"], 1, "'all', 'cpu'"),
    "missing recipe": (["merge", "none.yaml", "-o", "out"], 1, "none.yaml"),
    "output exists": (["merge", "--base", "base", *EXPERTS, "-m", "average", "-o", "e1"], 1, "holds an input"),
    "no model": (["inspect", "nowhere"], 1, "nowhere: no such file"),
    "unknown command": (["merg"], 2, "merg"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(cli, models, contents, case):
    arguments, code, word = WRONG[case]
    before = contents(models)
    done = cli(*arguments)
    assert done.code == code
    assert word in " ".join(done.err.split())
    assert done.out == ""
    assert contents(models) == before


def test_errors_as_json(cli):
    done = cli("merge", "--base", "base", "-e", "e1", "-e", "e9", "--json", "-o", "out")
    assert done.code == 1
    event = json.loads(done.out)
    assert event["event"] == "error"
    assert "e9" in event["message"]


def test_nothing_said_is_help(cli):
    done = cli()
    assert "merge" in done.out + done.err


def test_a_name_that_looks_like_markup(cli, make_model, tmp_path, llama):
    """Tensor names in brackets are shown as they are."""
    path = make_model(tmp_path / "m", {"w[bold].weight": llama()[Q], "[/red]": np.ones(2, np.float32)})
    done = cli("inspect", path)
    assert done.code == 0
    assert "w[bold].weight" in done.out
    assert "[/red]" in done.out


def in_a_terminal(folder, *arguments) -> list[str]:
    """The lines that a terminal of 80 columns shows, without colours."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "cfmerge", *map(str, arguments)]
    with subprocess.Popen(command, cwd=folder, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", 0) as terminal:
            while block := terminal.read(4096):
                shown += block
        process.wait()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "").splitlines()


@pytest.mark.parametrize(
    "command",
    [("inspect", "base"), ("plan", "--base", "base", *EXPERTS, "--tensors"), ("methods",), ("methods", "ace")],
    ids=["inspect", "plan", "methods", "one method"],
)
def test_nothing_is_cut_at_80_columns(models, command):
    """Names of tensors are broken behind dots, and no cell ends in an ellipsis."""
    lines = in_a_terminal(models, *command)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    if command[0] == "plan":
        start = next(n for n, line in enumerate(lines) if line.startswith("model.layers.0.self_attn."))
        assert (lines[start].split()[0] + lines[start + 1].split()[0]).startswith(Q) or Q in lines[start]


def test_reasons_are_told_once(cli):
    """Tensors refer to a rule, or to what is not known of them, by a number."""
    lines = cli(
        "plan", "--base", "base", *EXPERTS, "--tensors", "-r", "match=*.q_proj.*, method=average"
    ).out.splitlines()
    assert sum(line.endswith("average (1)") for line in lines) == 2
    assert "(1) by the rule for *.q_proj.*" in lines


def test_accumulate_and_sweep_tell_what_a_merge_would_tell(models, tmp_path, make_model, llama, capsys, monkeypatch):
    """In this process: notes stand on the terminal, not in cards alone."""
    from cfmerge.cli import main

    wrapped = make_model(tmp_path / "wrapped", {"module." + name: tensor for name, tensor in llama(1).items()})
    inputs = ("--base", str(models / "base"), "-e", str(wrapped), "-e", str(models / "e2"))
    for command in (("accumulate", "-m", "average"), ("sweep", "-m", "average", "-m", "task_arithmetic(scale=1)")):
        monkeypatch.setattr(sys, "argv", ["cfmerge", *command, *inputs, "-o", str(tmp_path / command[0])])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        assert capsys.readouterr().out.count("known under another name") == 1


def test_statistics_are_solved_by_the_method_that_they_were_made_for(cli, tmp_path):
    sums, out = tmp_path / "sums", tmp_path / "out"
    assert cli("accumulate", "--base", "base", *EXPERTS, "-m", "task_arithmetic(scale=0.5)", "-o", sums).code == 0
    assert cli("merge", "--base", "base", "--statistics", sums, "-o", out).code == 0
    recipe = load_recipe(out / "README.md")
    assert recipe.method == "task_arithmetic"
    assert recipe.parameters["scale"] == 0.5
