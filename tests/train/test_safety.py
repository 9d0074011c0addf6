"""Nothing from a file or a recipe is run: no pickles, no shells, no addresses but loopback."""

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from powernap.model.config import SleepConfig
from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import DataError
from powernap.train.data.tokenizer import load_tokenizer
from powernap.train.data.vocabulary import Numbers
from powernap.train.generation.export import FORMAT, ExportError, load_exported_weights, read_exported
from powernap.train.generation.generate import GenerateError, RunModel, load_run
from powernap.train.tracking.tracker import ui_command
from powernap.train.weights_folder import CONFIG, ONE_FILE
from tests.helpers import tiny
from tests.helpers.fuzzing import Touching, fuzz, no_longer_than

ROOT = Path(__file__).parents[2]
FOLDERS = ("model", "parallel", "train", "launch")


# ------------------------------------------------------------------------------------------------ saved streams, models


@pytest.fixture(scope="module")
def model(topology):
    return RunModel(tiny.build_stage(topology, dtype=torch.float32), "tiny", 1, Numbers("tiny"))


@pytest.fixture
def saved(model, tmp_path):
    """The file of a stream that has read three tokens."""
    stream = model.stream()
    list(stream.generate([[1, 2, 3]], max_tokens=2))
    stream.save(tmp_path / "stream.pt")
    assert model.load_stream(tmp_path / "stream.pt").unread == stream.unread
    return tmp_path / "stream.pt"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_in_place_of_a_saved_stream_is_refused(model, tmp_path, protocol):
    pwned, path = tmp_path / "pwned", tmp_path / "stream.pt"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Touching(pwned), protocol)),
        lambda: torch.save(Touching(pwned), path, pickle_protocol=protocol),
        lambda: torch.save(
            {"model": Touching(pwned)}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False
        ),
    ):
        write()
        with pytest.raises(GenerateError, match="not a state that powernap generate saved"):
            model.load_stream(path)
    assert not pwned.exists()
    pickle.loads(pickle.dumps(Touching(pwned)))
    assert pwned.exists()  # it would


plain = st.none() | st.integers() | st.lists(st.integers(-1, 20) | st.none(), max_size=3) | st.text(max_size=3)


@fuzz
@given(st.sampled_from(["decoder", "unread", "random"]), plain | st.lists(plain, max_size=2) | st.dictionaries(plain.filter(lambda p: not isinstance(p, list)), plain, max_size=2))  # fmt: skip
def test_a_saved_stream_with_anything_in_it(model, saved, field, value):
    state = torch.load(saved, weights_only=True)
    torch.save({**state, field: value}, saved)
    try:
        assert all(0 <= token < 17 for row in model.load_stream(saved).unread for token in row)
    except GenerateError as error:
        assert "\n" not in str(error)


@fuzz
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8))
def test_a_saved_stream_with_other_bytes(model, saved, place, new):
    data = bytearray(saved.read_bytes())
    data[place : place + len(new)] = new
    saved.write_bytes(data)
    try:
        model.load_stream(saved)
    except GenerateError as error:
        assert "\n" not in str(error)


@pytest.fixture
def exported(topology, tmp_path):
    """A folder as `powernap checkpoint export` writes it."""
    stage = tiny.build_stage(topology, dtype=torch.float32)
    save_file({name: weight.detach().clone() for name, weight in stage.named_parameters()}, tmp_path / ONE_FILE)
    config = {
        "format": FORMAT, "name": "tiny", "step": 1, "precision": "fp32", "model": tiny.model_config().model_dump(),
        "sleep": SleepConfig().model_dump(), "vocabulary": None,
    }  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    load_exported_weights(tmp_path, stage)
    return tmp_path


@pytest.mark.parametrize("field", ["hidden_size", "mlp.ffn_hidden_size", "vocab_size", "gdn.value_dim", "pattern"])
def test_an_exported_model_that_claims_terabytes_gets_nothing(exported, field):
    config = json.loads((exported / CONFIG).read_text())
    *section, name = field.split(".")
    (config["model"][section[0]] if section else config["model"])[name] = "AG" * 128 if field == "pattern" else 2**32
    (exported / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError, match="not the weights of the model in config.json"):
        load_run(exported)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**400, 2**32]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
vocabularies = st.fixed_dictionaries(
    {"task": st.sampled_from(["depo", "gsm", "gsm_infinite", "text"]), "fields": st.dictionaries(
        st.sampled_from(["nodes", "alphabet", "names", "tokenizer", "inputs"]),
        json_values | st.sampled_from(["tokenizer.json", "config.json", "bytes", "tiktoken:x", "/dev/zero", "words"]),
    )}
)  # fmt: skip


@fuzz
@given(st.sampled_from(["format", "name", "model", "sleep", "vocabulary", "model.window", "sleep.passes"]), json_values | vocabularies)  # fmt: skip
def test_an_exported_model_with_anything_in_its_config(exported, field, value):
    config = json.loads((exported / CONFIG).read_text())
    section, _, name = field.partition(".")
    if name and isinstance(config[section], dict):
        config[section][name] = value
    else:
        config[section] = value
    whole = (exported / CONFIG).read_text()
    (exported / CONFIG).write_text(json.dumps(config))
    try:
        read_exported(exported)
    except ExportError as error:
        assert "\n" not in str(error)
    (exported / CONFIG).write_text(whole)


@fuzz
@given(st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
def test_a_tokenizer_is_data(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(DataError) as error:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ shells, servers


@pytest.mark.parametrize(("scheme", "program"), [
    ("sftp", "curl"), ("ftps", "curl"), ("scp", "curl"), ("gs", "gsutil"), ("ais", "ais"),
    ("htgs", "curl"),
])  # fmt: skip
def test_a_url_reaches_its_program_whole(tmp_path, monkeypatch, scheme, program):
    """WebDataset hands it over in a list; with a shell between them, what is inside would be run."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / program
    script.write_text(f"#!/bin/sh\nfor word; do printf '%s\\n' \"$word\"; done > {tmp_path}/words\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    pwned = tmp_path / "pwned"
    url = f"{scheme}://x/'; touch {pwned}; '\"; touch {pwned}; \"$(touch {pwned})`touch {pwned}`|touch {pwned}&.tar"
    with pytest.raises(DataError, match="an empty file, not a tar"):
        ShardCache(tmp_path / "cache", retries=0).fetch(url)
    assert url.removeprefix(scheme) in (tmp_path / "words").read_text()
    assert not pwned.exists()


def test_a_url_with_a_command_inside_is_an_address(tmp_path):
    pwned = tmp_path / "pwned"
    with no_longer_than(), pytest.raises(DataError, match="cannot be read .Connection refused"):
        ShardCache(tmp_path / "cache", retries=0).fetch(f"http://127.0.0.1:9/'; touch {pwned}; '")
    assert not pwned.exists()


def test_the_pages_are_served_on_loopback_alone():
    command = ui_command(Path("runs"), 5000)
    assert [command[place + 1] for place, word in enumerate(command) if word == "--host"] == ["127.0.0.1"]
    assert not [word for word in command if word.startswith(("--host=", "-h", "--allowed-hosts", "--cors"))]


# ------------------------------------------------------------------------------------------------------------ the code

# Modules that make objects or run code out of bytes.
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
RUNS = {"eval", "exec", "compile", "__import__"}
NEVER = {
    "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "subprocess.getoutput",
    "subprocess.getstatusoutput", "torch.hub.load", "runpy.run_path", "shutil.unpack_archive", "gopen",
}  # fmt: skip
UNPACKS = {"extract", "extractall"}
# torch pickles what these send. Only ranks of one run speak to each other so.
SENDS_OBJECTS = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
ALLOWED = {
    ("parallel/topology.py", "sends objects"): "between the ranks of a run",
    ("parallel/checkpoint/writer.py", "sends objects"): "between the ranks of a run",
    # The one shell: WebDataset's for pipe: URLs, which are commands that the recipe's author wrote.
    ("train/data/source.py", "webdataset.gopen"): "its programs are given lists, but pipe:",
}


def findings(source: str) -> list[str]:
    """What a file does that needs a reason."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [module] if module.split(".")[0] in PICKLES or module == "webdataset.gopen" else []
            found += [
                alias.name for alias in node.names if f"{module}.{alias.name}" in NEVER | {"torch.load", "numpy.load"}
            ]
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            last = name.split(".")[-1]
            unsafe = (
                name in RUNS | NEVER
                or last in UNPACKS
                or (name == "torch.load" and options.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False")
                or options.get("shell", "False") != "False"
                or options.get("allow_pickle", "False") != "False"
                or options.get("weights_only", "True") != "True"
            )
            found += [name] if unsafe else []
            # Topology's own methods of these names are the one place that the others ask.
            found += ["sends objects"] if last in SENDS_OBJECTS and "topology." not in name else []
    return found


def test_code_that_runs_what_it_reads_has_a_reason():
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    found = {(str(file.relative_to(ROOT)), name) for file in files for name in findings(file.read_text())}
    assert len(files) > 50 and found == ALLOWED.keys()


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import dill.source", "torch.load(path)", "np.load(path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "yaml.load(text, Loader)",
        "from os import system", "os.system(text)", "subprocess.run(text, shell=True)", "Popen(text, shell=yes)", "eval(text)",
        "tar.extractall()", "from torch import load", "dist.recv_object_list(values)", "from webdataset.gopen import gopen",
    ],
)  # fmt: skip
def test_it_would_be_found(line):
    assert findings(line)
