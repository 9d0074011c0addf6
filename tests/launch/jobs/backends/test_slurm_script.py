"""The batch script, run by bash among commands that only play SLURM, and how SLURM's answers are read."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from powernap.launch.jobs.backends.slurm import Slurm, _parse_line, _status
from powernap.launch.jobs.backends.slurm_causes import refusal
from powernap.launch.jobs.backends.slurm_json import parse_jobs
from powernap.launch.jobs.cluster import parse_cluster
from powernap.launch.jobs.description import JobDescription, JobError
from powernap.launch.jobs.job import BuildJob, Job, TrainingJob
from powernap.train.recipe_file import load_recipe
from tests.helpers import runs

NASTY = "a b'c\"d$HOME`id`$(id)\\;#&|<>*~\n{{e}}%f"

# Says what reached it, then runs the ranks as srun would.
SRUN = """#!/bin/bash
printf '%s\\0' "$@" >"$PLAY/srun"
env -0 >"$PLAY/environment"
while [ "${1#--}" != "$1" ]; do [[ $1 = --ntasks=* ]] && tasks=${1#--ntasks=}; shift; done
for ((rank = 0; rank < tasks; rank++)); do SLURM_PROCID=$rank "$@" & ranks+=($!); done
code=0
for rank in "${ranks[@]}"; do wait "$rank"; ended=$?; ((ended > code)) && code=$ended; done
exit $code
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") echo b7; echo a1 ;;
"show node") echo "NodeName=$4 Arch=x CoresPerSocket=1 NodeAddr=10.0.0.7 NodeHostName=$4 Version=22" ;;
*) echo "$@" >>"$PLAY/scontrol" ;;
esac
"""


@dataclass
class Play:
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.is_file() else ""

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess:
        given = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin", "PLAY": str(self.folder), "HOME": "/root",
            "SLURM_JOB_ID": "37", "SLURM_JOB_NODELIST": "b7,a1",
        }  # fmt: skip
        (self.folder / "job.sbatch").write_text(script)
        return subprocess.run(
            ["bash", str(self.folder / "job.sbatch")],
            env=given | environment, text=True, capture_output=True, timeout=30,
        )  # fmt: skip


@pytest.fixture
def play(tmp_path):
    play = Play(tmp_path)
    play.command("srun", SRUN)
    play.command("scontrol", SCONTROL)
    play.command("squeue", '#!/bin/sh\ncat "$PLAY/state"\n')
    play.command("scancel", '#!/bin/sh\necho "$@" >>"$PLAY/scancel"\n')
    play.command("sleep", "#!/bin/sh\n")
    (tmp_path / "state").write_text("RUNNING None\n")
    return play


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return load_recipe(
        str(runs.prepare(tmp_path_factory.mktemp("script"), train_samples=64, database=False, data={"lanes": 1})), []
    )


def job(recipe, play: Play, profile: dict | None = None, submit_dir: Path | None = None, **description) -> Job:
    """Of two ranks; its powernap is play's."""
    wanted = {"nodes": 2, "processes_per_node": 1, "environment": str(play.folder), "retries": 1} | description
    made = TrainingJob(
        recipe=recipe,
        description=JobDescription(**wanted),
        cluster=parse_cluster({"kind": "slurm", **(profile or {})}),
        submission_id="0123456789abcdef",
        attempt=1,
        submit_dir=submit_dir or play.folder,
        submitted_as="powernap submit 'it''s $(mine)'",
    )
    (made.submit_dir / made.folder.path).mkdir(parents=True, exist_ok=True)
    return made


def render(*jobs: Job) -> str:
    return Slurm(jobs[0].cluster).render(list(jobs))["job.sbatch"]


REQUEUE = "requeue 37\n"


@pytest.mark.parametrize(
    ("ranks", "state", "before", "code", "said", "requeued", "failures"),
    [
        ("exit 0", "RUNNING None", [], 0, "succeeded", "", ""),
        ("exit 75", "RUNNING None", [], 0, "running", REQUEUE, ""),
        ("exit 75", "COMPLETING TimeLimit", [], 0, "running", REQUEUE, ""),
        ("exit 75", "COMPLETING None", [], 75, "cancelled", "", ""),  # scancel, or preempted: SLURM's own affair
        ("exit 75", "RUNNING None", ["cancelled"], 75, "cancelled", "", ""),
        ("exit 1", "RUNNING None", [], 0, "running", REQUEUE, "1\n"),
        ("exit 1", "COMPLETING None", [], 1, "cancelled", "", ""),
        ("exit 1", "RUNNING None", ["failures"], 1, "failed", "", "2\n"),
        ("exit 75", "RUNNING None", ["failures"], 0, "running", REQUEUE, "1\n"),
        ("kill -KILL $$", "RUNNING None", ["failures"], 137, "failed", "", "2\n"),
        ("exit 2", "RUNNING None", [], 2, "failed", "", ""),
        ("exit 130", "RUNNING None", [], 130, "failed", "", ""),
        # One rank says why, and the others are killed for it.
        (
            "[ $SLURM_PROCID = 1 ] && exit 2; sleep; /bin/sleep 0.3; kill -KILL $$",
            "RUNNING None",
            [],
            2,
            "failed",
            "",
            "",
        ),
        (
            "[ $SLURM_PROCID = 1 ] && exit 1; /bin/sleep 0.3; exit 137",
            "RUNNING None",
            ["failures"],
            1,
            "failed",
            "",
            "2\n",
        ),
        (
            "[ $SLURM_PROCID = 1 ] && exit 75; /bin/sleep 0.3; exit 1",
            "RUNNING None",
            ["failures"],
            1,
            "failed",
            "",
            "2\n",
        ),
    ],
)
def test_how_it_ends_says_what_is_next(recipe, play, ranks, state, before, code, said, requeued, failures):
    made = job(recipe, play)
    folder = play.folder / made.folder.path
    # Cancelling comes while it runs.
    cancel = f"touch {folder}/cancelled" if "cancelled" in before else ""
    play.command("powernap", f"#!/bin/bash\n{cancel}\n{ranks}\n")
    (play.folder / "state").write_text(state + "\n")
    if "failures" in before:
        (folder / "failures").write_text("1\n")
    done = play.run(render(made))
    found = json.loads((folder / "state.json").read_text())
    assert (done.returncode, found["state"], play.read("scontrol")) == (code, said, requeued), done
    assert found["id"] == "37" and found["nodes"] == "b7,a1"
    assert play.read(f"{made.folder.path}/failures") == failures


def test_what_was_cancelled_before_it_started_does_not_start(recipe, play):
    made = job(recipe, play)
    (play.folder / made.folder.path / "cancelled").touch()
    assert play.run(render(made)).returncode == 75
    assert not (play.folder / "srun").exists() and not play.read("scontrol")


def test_a_controller_that_is_away_is_asked_again(recipe, play):
    play.command("powernap", "#!/bin/sh\nexit 75\n")
    play.command("squeue", '#!/bin/sh\necho >>"$PLAY/asked"; [ $(wc -l <"$PLAY/asked") -gt 3 ] && echo RUNNING None\n')
    assert play.run(render(job(recipe, play))).returncode == 0
    assert play.read("scontrol") == REQUEUE


def test_an_element_of_an_array_asks_for_itself(recipe, play):
    """37 would be all of the array."""
    other = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": "other"})})
    play.command("powernap", '#!/bin/sh\necho "$2" >>"$PLAY/ran"; exit 75\n')
    script = render(job(recipe, play), job(other, play))
    assert "#SBATCH --array=0-1" in script
    play.run(script, SLURM_ARRAY_JOB_ID="37", SLURM_ARRAY_TASK_ID="1", SLURM_RESTART_COUNT="4")
    assert set(play.read("ran").split()) == {"runs/other/jobs/1/recipe.yaml"}
    assert play.read("scontrol") == "requeue 37_1\n"
    found = json.loads(play.read("runs/other/jobs/1/state.json"))
    assert (found["id"], found["restarts"]) == ("37_1", 4)


def test_an_element_builds_its_part(recipe, play):
    made = job(recipe, play)
    common = {f.name: getattr(made, f.name) for f in fields(Job)}
    words = ("text", "out", "inputs=a b")
    parts = [
        BuildJob(build="build-out", output=Path("out"), words=words, part=(number, 2), **common) for number in (1, 2)
    ]
    for part in parts:
        (play.folder / part.folder.path).mkdir(parents=True)
    play.command("powernap", '#!/bin/sh\nprintf "%s|" "$@" >>"$PLAY/ran"\n')
    play.run(render(*parts), SLURM_ARRAY_JOB_ID="37", SLURM_ARRAY_TASK_ID="1")
    (ran,) = set(play.read("ran").replace("data|", "\n").split("\n")[1:])
    assert ran == "build|text|out|inputs=a b|--part|2/2|"
    assert json.loads(play.read("runs/build-out-part-2/jobs/1/state.json"))["state"] == "succeeded"
    assert not play.read("runs/build-out-part-1/jobs/1/state.json")


def test_values_reach_the_ranks_as_they_are_and_nothing_else_happens(recipe, play):
    submit_dir = play.folder / NASTY.replace("\n", " ").replace("\\", " ").replace("/", " ")
    private = play.folder / "it's private"
    private.write_text("secret value$(id)\n")
    profile = {"secrets": {"KEY": str(private)}, "setup": ["export SETUP=yes", "set -x"]}
    made = job(
        recipe, play, profile, submit_dir, env={"NASTY": NASTY}, secrets=["KEY"], cpus_per_process=3, device="gpu"
    )  # fmt: skip
    play.command("powernap", '#!/bin/bash\npwd >"$PLAY/pwd"\nprintf "%s\\n" "$@" >"$PLAY/arguments"\n')
    script = render(made)
    done = play.run(script)
    assert done.returncode == 0, done.stderr
    found = dict(pair.split("=", 1) for pair in play.read("environment").split("\0") if "=" in pair)
    assert found["POWERNAP_SUBMITTED_AS"] == made.submitted_as
    assert found["NASTY"] == NASTY and found["KEY"] == "secret value$(id)" and found["SETUP"] == "yes"
    assert (found["MASTER_ADDR"], found["OMP_NUM_THREADS"]) == ("10.0.0.7", "3")
    assert "MASTER_PORT" not in found  # the ranks draw it
    assert play.read("pwd") == f"{submit_dir}\n"
    assert play.read("arguments").split() == ["train", "runs/tiny/jobs/1/recipe.yaml", "--auto-resume"]
    options = play.read("srun").split("\0")
    for option in ("--ntasks=2", "--kill-on-bad-exit=1", "--cpus-per-task=3", "--distribution=block", "--export=ALL"):
        assert option in options
    assert "#SBATCH --gpus-per-node=1\n" in script
    everything = (
        script
        + done.stdout
        + done.stderr
        + play.read("srun")
        + "".join(path.read_text() for path in submit_dir.rglob("*") if path.is_file())
    )
    assert "secret value" not in everything
    assert sorted(os.listdir(submit_dir)) == ["runs"]


def test_a_secret_that_is_not_there_is_told_and_nothing_starts(recipe, play):
    made = job(recipe, play, {"secrets": {"KEY": str(play.folder / "gone")}}, secrets=["KEY"])
    assert play.run(render(made)).returncode == 1
    assert "KEY" in json.loads(play.read("runs/tiny/jobs/1/state.json"))["reason"] and not play.read("srun")


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_containers_get_folders_and_variables_by_name(recipe, play, container):
    private = play.folder / "key"
    private.write_text("secret value\n")
    profile = {"container": container, "secrets": {"KEY": str(private)}}
    made = job(
        recipe, play, profile, environment=None, image="docker://powernap:1", mounts=["/data:/data:ro"],
        env={"MODE": "a,b c"}, secrets=["KEY"],
    )  # fmt: skip
    here = str(play.folder)
    play.command("powernap", '#!/bin/bash\nenv -0 >"$PLAY/inside"\n')
    play.command(
        "apptainer",
        """#!/bin/bash
printf '%s\\0' "$@" >"$PLAY/apptainer"
while [ "$1" != docker://powernap:1 ]; do shift; done
shift
env -0 | while IFS= read -r -d '' pair; do
    [[ $pair = APPTAINERENV_* ]] && printf '%s\\0' "${pair#APPTAINERENV_}"
done >"$PLAY/taken_over"
exec "$@"
""",
    )
    done = play.run(render(made))
    assert done.returncode == 0, done.stderr
    options = play.read("srun").split("\0")
    assert play.read("inside"), "it ran"
    if container == "pyxis":
        assert "--container-image=docker://powernap:1" in options
        assert f"--container-mounts={here}:{here},/data:/data:ro" in options
        assert f"--container-workdir={here}" in options
        (names,) = [option for option in options if option.startswith("--container-env=")]
        assert {"MASTER_ADDR", "MASTER_PORT", "MODE", "KEY"} <= set(names.partition("=")[2].split(","))
        assert not play.read("apptainer")
    else:
        given = play.read("apptainer").split("\0")
        wanted = ["exec", "--bind", f"{here}:{here}", "--bind", "/data:/data:ro", "--pwd", here, "docker://powernap:1"]
        assert given[: len(wanted) + 1] == [*wanted, "powernap"]
        assert {"KEY=secret value", "MODE=a,b c", "MASTER_ADDR=10.0.0.7"} <= set(play.read("taken_over").split("\0"))
        assert "secret value" not in play.read("apptainer")
    assert "secret value" not in play.read("srun")


@pytest.mark.parametrize(
    ("profile", "description", "options"),
    [
        ({}, {"time": "1d12h", "grace": "4m"}, ["--time=1-12:00:00", "--signal=USR1@300", "--requeue"]),
        ({"gpu_type": "h100"}, {"device": "gpu", "processes_per_node": 8}, ["--gpus-per-node=h100:8", "--nodes=2"]),
        ({"exclusive": True}, {"memory": "1.5GB"}, ["--mem=1431M", "--exclusive", "--open-mode=append"]),
        ({"partition": "a", "account": "b", "qos": "c"}, {}, ["--partition=a", "--account=b", "--qos=c"]),
        ({"constraint": "a&b|c"}, {}, [r"--constraint=a\&b\|c", "--comment=powernap:0123456789abcdef"]),
        ({"directives": ["--switches=1"]}, {"cpus_per_process": 4}, ["--switches=1", "--cpus-per-task=4"]),
    ],
)
def test_what_is_asked_of_sbatch(recipe, play, profile, description, options):
    lines = render(job(recipe, play, profile, **description)).splitlines()
    for option in options:
        assert f"#SBATCH {option}" in lines
    assert subprocess.run(["bash", "-n"], input="\n".join(lines), text=True).returncode == 0


@pytest.mark.skipif(platform.machine() == "aarch64", reason="no package of shellcheck for it")
def test_shellcheck_finds_nothing(recipe, play):
    (play.folder / "script").write_text(render(job(recipe, play, env={"NASTY": NASTY})))
    # A function that a trap calls, and a script within quotes.
    command = [
        str(Path(sys.executable).parent / "shellcheck"),
        "--exclude=SC2016,SC2329,SC2317",
        str(play.folder / "script"),
    ]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("profile", "overrides", "words"),
    [
        ("kind: slurm", ["job.image=powernap"], ["job.image=powernap", "container=none", "pyxis or apptainer"]),
        ("kind: slurm", ["job.mounts=['/a:/b']"], ["job.mounts without job.image"]),
        ("kind: slurm", ["job.time=3m"], ["job.time=3m", "job.grace=2m", "00:04:00 or more"]),
        ("kind: slurm", ["parallel.data=1,2"], ["1 x 1 and 1 x 2", "submit each alone"]),
        ("kind: slurm", ["job.secrets=[NOT_SET_HERE]"], ["NOT_SET_HERE"]),
        ("{kind: slurm, container: pyxis}", ["job.image=a", "run.root=/elsewhere"], ["/elsewhere/tiny", "job.mounts"]),
    ],
)
def test_what_could_not_work_is_refused(tmp_path, monkeypatch, capfd, profile, overrides, words):
    monkeypatch.chdir(tmp_path)
    runs.prepare(tmp_path, train_samples=64, database=False, data={"lanes": 1})
    Path("here.yaml").write_text(profile + "\n")
    capfd.readouterr()
    runs.assert_refused(["submit", "tiny.yaml", "--on", "here.yaml", *overrides], capfd, *words)
    assert not Path("runs").exists()


LINE = (
    "JobId=37 JobName=RUNNING UserId=me(1) JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts=2 "
    "BatchFlag=1 ExitCode={code} RunTime=00:00:01 NodeList={nodes} NumNodes=2 WorkDir=/a Reason=x b Comment=c"
)


@pytest.mark.parametrize(
    ("state", "reason", "code", "cancelled", "expected"),
    [
        ("PENDING", "Resources", "0:0", False, ("pending", "Resources", None)),
        ("PENDING", "ReqNodeNotAvail,_UnavailableNodes:n1", "0:0", False, ("pending", "ReqNodeNotAvail,_UnavailableNodes:n1", None)),
        ("PENDING", "job requeued in held state", "0:0", False, ("pending", "job requeued in held state", None)),
        ("REQUEUE_HOLD", "None", "0:0", False, ("pending", "REQUEUE_HOLD", None)),
        ("SUSPENDED", "None", "0:0", False, ("pending", "SUSPENDED", None)),
        ("CONFIGURING", "None", "0:0", False, ("pending", "CONFIGURING", None)),
        ("RUNNING", "None", "0:0", False, ("running", "", None)),
        ("RUNNING", "None", "0:0", True, ("stopping", "", None)),
        ("COMPLETING", "None", "0:0", False, ("stopping", "", None)),
        ("COMPLETED", "None", "0:0", True, ("succeeded", "", 0)),
        ("FAILED", "NonZeroExitCode", "1:0", False, ("failed", "NonZeroExitCode", 1)),
        ("FAILED", "NonZeroExitCode", "75:0", True, ("cancelled", "NonZeroExitCode", 75)),
        ("CANCELLED", "None", "0:15", False, ("cancelled", "", 143)),
        ("TIMEOUT", "TimeLimit", "0:15", False, ("failed", "TIMEOUT", 143)),
        *((word, "None", "0:0", False, ("failed", word, 0)) for word in ("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE")),
    ],
)  # fmt: skip
def test_states_in_the_words_of_every_cluster(recipe, play, state, reason, code, cancelled, expected):
    folder = job(recipe, play).folder
    folder = type(folder)(play.folder / folder.path)
    if cancelled:
        folder.cancelled.touch()
    line = _parse_line("37", LINE.format(state=state, reason=reason, code=code, nodes="n[1-2]"))
    found = _status(line, {}, folder)
    assert (found.state, found.reason, found.exit_code) == expected
    assert (found.restarts, found.nodes) == (2, "n[1-2]")


UNSET, ZERO = {"set": False, "infinite": False, "number": 0}, {"set": True, "infinite": False, "number": 0}


def number(value: int) -> dict:
    return {"set": True, "infinite": False, "number": value}


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        # squeue 22.05
        ({"job_id": 1, "array_job_id": 0, "array_task_id": None, "job_state": "RUNNING", "state_reason": "None", "exit_code": 0,
          "nodes": "n1", "comment": "c", "restart_cnt": 2}, ("1", "RUNNING", "", None, "c", 2)),
        ({"job_id": 2, "array_job_id": 1, "array_task_id": 0, "job_state": "FAILED", "state_reason": "NonZeroExitCode",
          "exit_code": 256, "nodes": "", "comment": "c", "restart_cnt": 0}, ("1_0", "FAILED", "NonZeroExitCode", 1, "c", 0)),
        ({"job_id": 2, "job_state": "FAILED", "exit_code": 9, "comment": ""}, ("2", "FAILED", "", 137, "", None)),
        # sacct 22.05
        ({"job_id": 3, "array": {"job_id": 0, "task_id": None}, "state": {"current": "COMPLETED", "reason": "None"},
          "exit_code": {"status": "SUCCESS", "return_code": 0}, "comment": {"job": None}}, ("3", "COMPLETED", "", 0, "", None)),
        ({"job_id": 3, "array": {"job_id": 3, "task_id": 1}, "state": {"current": "FAILED", "reason": "None"},
          "exit_code": {"status": "SUCCESS", "return_code": 0}, "comment": {"job": "c"}}, ("3_1", "FAILED", "", None, "c", None)),
        ({"job_id": 3, "state": {"current": "FAILED"}, "exit_code": {"status": "SIGNALED", "return_code": None,
          "signal": {"signal_id": 9, "name": "Killed"}}}, ("3", "FAILED", "", 137, "", None)),
        # squeue 23.02 and from 23.11
        ({"job_id": 4, "array_job_id": ZERO, "array_task_id": UNSET, "job_state": "COMPLETED", "exit_code": ZERO, "comment": "c",
          "restart_cnt": 1}, ("4", "COMPLETED", "", 0, "c", 1)),
        ({"job_id": 5, "array_job_id": number(4), "array_task_id": number(1), "job_state": ["FAILED", "COMPLETING"],
          "state_reason": "None", "exit_code": {"status": ["ERROR"], "return_code": number(1),
          "signal": {"id": UNSET, "name": ""}}, "comment": "c"}, ("4_1", "COMPLETING", "", None, "c", None)),
        # sacct from 23.11
        ({"job_id": 6, "array": {"job_id": 6, "task_id": ZERO}, "state": {"current": ["FAILED"], "reason": "None"},
          "exit_code": {"status": ["ERROR"], "return_code": number(75), "signal": {"id": UNSET, "name": ""}},
          "comment": {"job": "c"}, "restart_cnt": 3, "nodes": "n1"}, ("6_0", "FAILED", "", 75, "c", 3)),
        ({"job_id": 7, "state": {"current": ["TIMEOUT"], "reason": "TimeLimit"}, "exit_code": {"status": ["SIGNALED"],
          "return_code": UNSET, "signal": {"id": number(15), "name": "TERM"}}}, ("7", "TIMEOUT", "TimeLimit", 143, "", None)),
    ],
)  # fmt: skip
def test_json_of_old_and_new_versions(job, expected):
    (found,) = parse_jobs(json.dumps({"jobs": [job]}))
    assert (found.id, found.state, found.reason, found.exit_code, found.comment, found.restarts) == expected


@pytest.mark.parametrize("text", ["", "[]", '{"jobs": [{}]}', '{"jobs": 3}'])
def test_what_is_no_json_of_slurm_is_an_error_and_nothing_else(text):
    with pytest.raises(ValueError):
        parse_jobs(text)


@pytest.mark.parametrize(
    ("said", "reason", "runs_of_sweep", "profile", "asks", "words"),
    [
        ("Invalid job array specification", "", 3, {}, {}, ["the sweep has 3 runs", "at most 2 (MaxArraySize)"]),
        ("Memory specification can not be satisfied", "", 1, {}, {"memory": "9GiB"},
         ["job.memory=9GiB: the largest node of partition main has 8000 MiB"]),
        ("CPU count per node can not be satisfied", "", 1, {"partition": "wide"}, {"cpus_per_process": 17},
         ["job.cpus_per_process=17 x job.processes_per_node=1: the largest node of partition wide has 16 CPUs"]),
        ("Requested node configuration is not available", "", 1, {}, {"device": "gpu", "processes_per_node": 5},
         ["job.processes_per_node=5 with a GPU each: the largest node of partition main has 4"]),
        ("QOSMaxMemoryPerJob; Job violates accounting/QOS policy", "", 1, {}, {}, ["see job.memory: QOSMaxMemoryPerJob"]),
        ("", "PartitionConfig", 1, {}, {"nodes": 3}, ["never start", "job.nodes=3: partition main has MaxNodes=2"]),
        ("", "PartitionTimeLimit", 1, {}, {"time": "3h"}, ["job.time=3h: partition main has MaxTime=02:00:00"]),
        ("", "QOSMaxCpuPerJobLimit", 1, {}, {}, ["never start", "see job.cpus_per_process"]),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_and_the_limit(
    recipe, play, monkeypatch, said, reason, runs_of_sweep, profile, asks, words
):
    last = "sbatch: error: Batch job submission failed: it is not available"
    play.command(
        "sbatch", f"#!/bin/sh\n[ -z '{said}' ] && echo 7 && exit\necho 'sbatch: error: {said}\n{last}' >&2; exit 1\n"
    )
    rows = {"main": r"%s|2|8|8000|gpu:4(S:0)\n", "wide": r"%s|2|16|8000|(null)\n"}
    asked = f'case "$*" in *--partition=wide*) printf "{rows["wide"]}" wide;; *) printf "{rows["main"] + rows["wide"]}" "main*" wide;; esac'
    play.command("sinfo", f"#!/bin/sh\n{asked}\n")
    limits = "PartitionName=x MaxNodes=2 MaxTime=02:00:00 MaxCPUsPerNode=UNLIMITED MaxMemPerNode=UNLIMITED"
    play.command("scontrol", f'#!/bin/sh\n[ "$2" = config ] && echo "MaxArraySize            = 2" || echo {limits}\n')
    play.command("squeue", f"#!/bin/sh\necho {reason}\n")
    monkeypatch.setenv("PATH", f"{play.folder}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(play.folder)
    one = job(recipe, play, profile, **asks)
    backend = Slurm(one.cluster)
    with pytest.raises(JobError) as error:
        if runs_of_sweep == 1:
            backend.submit([one], {}, one.folder.path)
        else:
            raise JobError(refusal(backend_says(said), [one] * runs_of_sweep, one.cluster))
    for word in ["SLURM", *words]:
        assert word in str(error.value), error.value
    assert said in str(error.value)


def backend_says(said: str) -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], 1, "", f"sbatch: error: Batch job submission failed: {said}\n")
