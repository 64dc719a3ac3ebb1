"""Batch scripts: bash and shellcheck parse each, and a fake qsub runs one through its chain."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from prelora_ds.config.load import load_config
from prelora_ds.errors import ConfigError
from prelora_ds.hosts.jobs import PROFILES, Job, Profile, Task, load_profile, render

RECIPE = Path("launch/recipes/vit_large_in1k_prelora_exp1.yaml").resolve()
ARRAY = tuple(Task((f"convergence.tau={tau}", f"run.name=chain-tau-{tau}"), Path(f"/shared/out-tau-{tau}"),
                   Path(f"/shared/out-tau-{tau}.supervise")) for tau in ("0.5", "it's 1"))
RUN = Task((), Path("/shared/out"), Path("/shared/out.supervise"))
JOB = Job("chain", Path("/shared/job.sh"), Path.cwd(), (RUN,), RECIPE,
          ["train.log_every=5"], None, 16, 1, 7200.0, 300, 50, account="acct")


def script(profile: str, **changes) -> str:
    paths = ["run.output_dir=/shared/out", "data.train=/shared/train", "data.val=/shared/val"]
    return render(replace(JOB, **changes), load_profile(profile), load_config(RECIPE, paths))


@pytest.mark.parametrize("profile", sorted(path.stem for path in PROFILES.glob("*.yaml")))
@pytest.mark.parametrize("changes", [{}, {"tasks": ARRAY}, {"tasks": ARRAY, "spares": 0},
                                     {"stage": True, "container": "apptainer exec --nv 'my image.sif'",
                                      "network": False, "setup": ["module load other"], "queue": "q"}])
def test_bash_and_shellcheck_accept_the_script_of_every_site(profile: str, changes: dict, tmp_path: Path) -> None:
    if changes.get("stage") and load_profile(profile).scratch is None:
        changes = changes | {"stage": False}
    path = tmp_path / "job.sh"
    path.write_text(script(profile, **changes))
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.fail("shellcheck is not installed") if os.environ.get("CI") else pytest.skip("shellcheck is missing")
    done = subprocess.run(["shellcheck", path], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("profile", ["polaris", "perlmutter", "frontier", "pbs", "slurm"])
def test_directives_come_first_and_ask_for_nodes_spares_time_and_account(profile: str) -> None:
    lines = script(profile).splitlines()
    pbs = load_profile(profile).scheduler == "pbs"
    head = [line for line in lines if line.startswith("#PBS" if pbs else "#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert all(lines.index(line) < first_command for line in head)
    assert all(re.fullmatch(r"#PBS -[A-Za-z] ?\S*|#SBATCH --[a-z-]+(=\S+)?", line) for line in head), head
    text = "\n".join(head)
    assert re.search(r"select=17:" if pbs else r"--nodes=17\b", text) and "02:00:00" in text and "acct" in text
    assert ("left=$(( 6900 > SECONDS ? 6900 - SECONDS : 1 ))" if pbs else "--signal=B:USR1@300") in "\n".join(lines)
    if not pbs:
        assert "#SBATCH --requeue" in head and "#SBATCH --open-mode=append" in head
    survives = "#PBS -W tolerate_node_failures=all" if pbs else "#SBATCH --no-kill"
    assert survives in head and survives not in script(profile, spares=0), "a dead node would end the job, spare or not"


@pytest.mark.parametrize(("profile", "changes", "key"), [
    ("polaris", {"walltime_s": 4 * 3600.0}, "--walltime"), ("polaris", {"account": None}, "--account"),
    ("polaris", {"nodes": 496}, "--nodes"), ("frontier", {"walltime_s": 7201.0}, "--walltime"),
    ("slurm", {"walltime_s": 400.0}, "--walltime"), ("slurm", {"stage": True}, "--stage"),
    ("slurm", {"account": "a b"}, "--account, --queue"), ("slurm", {"name": "1 run"}, "run.name"),
    ("nowhere", {}, "--profile")])
def test_what_a_site_would_refuse_is_refused_before_submission(profile: str, changes: dict, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        script(profile, **changes)
    assert caught.value.key == key


@pytest.mark.parametrize("array", [False, True])
def test_a_pbs_chain_continues_while_the_run_exits_with_99_and_ends_with_the_run(tmp_path: Path, array: bool) -> None:
    """Run the unchanged script with a fake supervisor that needs three jobs; the script's own timer warns it."""
    folder, log = tmp_path / "code", tmp_path / "log"
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "pretrain.py").touch()
    (tmp_path / "nodes").write_text("n1\nn1\nn2\n")
    run = tmp_path / "python"
    run.write_text(f"""#!/bin/bash
echo "run begins" >> {log}
printf '%s\\n' "$@" > {tmp_path}/arguments
cp "$3" {tmp_path}/hostfile
[ "$(grep -c run {log})" -ge 3 ] && exit 0
trap 'echo warned >> {log}; kill $!; exit 99' USR1
sleep 30 & wait $!
exit 1
""")
    qsub = tmp_path / "qsub"
    job = tmp_path / "job.sh"
    qsub.write_text(f"""#!/bin/bash
echo "qsub $*" >> {log}
[ "$1" = -J ] && export PBS_ARRAY_INDEX="${{2%%-*}}" && shift 2
[ "$1" = -v ] && export "${{2?}}" && shift 2
exec bash "$1"
""")
    tasks = [replace(task, output_dir=tmp_path / task.output_dir.name) for task in (ARRAY if array else (RUN,))]
    text = render(replace(JOB, script=job, folder=folder, walltime_s=3.0, warn_s=1, tasks=tuple(tasks)),
                  load_profile("pbs"), load_config(RECIPE))
    text = re.sub(r"^\S+ -u -m prelora_ds.cli", str(run), text, flags=re.MULTILINE)
    job.write_text(text)
    for path in (run, qsub):
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(["bash", job], text=True, capture_output=True, timeout=60, env=os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PBS_NODEFILE": str(tmp_path / "nodes"),
        **({"PBS_ARRAY_INDEX": "1"} if array else {})})
    again = "-J 1-2:2 " if array else ""
    assert log.read_text().split("\n") == [
        "run begins", "warned", f"qsub {again}-v PRELORA_JOBS_BEFORE=1 {job}", "run begins", "warned",
        f"qsub {again}-v PRELORA_JOBS_BEFORE=2 {job}", "run begins", ""], done.stderr
    ends = [line.split()[6] for line in done.stdout.splitlines() if "the run exited with" in line]
    assert ends == ["99", "99", "0"]
    assert (tmp_path / "hostfile").read_text() == "n1 slots=4\nn2 slots=4\n"
    overrides = (tmp_path / "arguments").read_text().splitlines()[-len(tasks[-1].overrides) - 1:]
    assert overrides == [*tasks[-1].overrides, f"run.output_dir={tasks[-1].output_dir}"]
    assert not list(tmp_path.glob("out*.job.*"))


def job_command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["prelora", "job", RECIPE, "--profile", "slurm", "--out", tmp_path / "job.sh",
               f"run.output_dir={tmp_path}/out", *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)


def test_a_sweep_is_an_array_with_a_run_and_a_folder_for_each_combination(tmp_path: Path) -> None:
    done = job_command(tmp_path, "--sweep", "convergence.tau=0.5, 1", "--sweep", "lora.warmup=5 epochs,10 epochs",
                       "--resume", f"{tmp_path}/full/checkpoints/step-00000100")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --array=0-3\n" in text and f"--resume {tmp_path}/full/checkpoints/step-00000100" in text
    folders = re.findall(rf"{tmp_path}/out(\S+): convergence\.tau=(\S+) 'lora\.warmup=(\S+ epochs)'", done.stdout)
    assert folders == [(f"-tau-{tau}-warmup-{warmup}_epochs", tau, f"{warmup} epochs")
                       for tau in ("0.5", "1") for warmup in ("5", "10")]
    for task, (suffix, tau, _) in enumerate(folders):
        case = re.search(rf"^{task}\)\n(.*?);;", text, re.MULTILINE | re.DOTALL)
        assert case is not None
        assert f"convergence.tau={tau} " in case[1] and f"\n    output_dir={tmp_path}/out{suffix}\n" in case[1]


@pytest.mark.parametrize(("sweep", "said"), [
    (["convergence.tau"], "is not of the form"), (["convergence.tau=1,1"], "one of them twice"),
    (["convergence.tau=0.5,[1"], "cannot be read"), (["convergence.tau=0.5,-1"], "convergence.tau = -1"),
    (["convergence.tua=1,2"], "did you mean"), (["run.output_dir=a,b"], "is the same for all runs"),
    (["convergence.tau=1,2", "convergence.tau=3,4"], "is swept twice")])
def test_a_sweep_with_a_mistake_writes_nothing(tmp_path: Path, sweep: list[str], said: str) -> None:
    done = job_command(tmp_path, *(f"--sweep={text}" for text in sweep))
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "job.sh").exists()


def test_a_folder_without_the_script_that_a_job_starts_is_refused(tmp_path: Path) -> None:
    message = r"does not contain launch/pretrain\.py.*\n  remedy: run `prelora job` in a checkout"
    with pytest.raises(ConfigError, match=message):
        script("polaris", folder=tmp_path)


@pytest.mark.parametrize(("heartbeats", "requeued"), [
    ([None] * 6, False), (["1", "2", "3", "4", "5", "6"], False), (["1", "2", None, None, "3", None, "4", ""], False),
    (["1", "", ""], False), (["1", "2", "2"], True)])
def test_the_last_node_of_a_slurm_job_requeues_it_only_when_the_heartbeat_was_read_twice_unchanged(
        tmp_path: Path, heartbeats: list[str | None], requeued: bool) -> None:
    """Run the watching lines of the script; each poll finds the next heartbeat, or none (None)."""
    watcher = re.search(r"bash -c '\n(seen=.*?done)' watch", script("slurm"), re.DOTALL)
    assert watcher is not None
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/said")
    looks = "\n".join(f"{n}) " + ("rm -f heartbeat" if text is None else f"printf '%s' '{text}' > heartbeat") + ";;"
                      for n, text in enumerate(heartbeats, 1))
    (tmp_path / "sleep").write_text(
        f"#!/bin/bash\necho x >> looks\ncase $(wc -l < looks) in\n{looks}\n*) exit 1;;\nesac")
    for name in ("scontrol", "sleep"):
        (tmp_path / name).chmod(0o755)
    subprocess.run(["bash", "-c", watcher[1], "watch", "heartbeat", "17"], cwd=tmp_path, timeout=20, check=False,
                   stderr=subprocess.DEVNULL, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (tmp_path / "said").exists() == requeued
    assert not requeued or (tmp_path / "said").read_text() == "requeue 17\n"


def test_the_walltime_limit_grows_with_the_nodes_and_does_not_apply_to_another_queue() -> None:
    assert "walltime=06:00:00" in script("polaris", nodes=24, walltime_s=6 * 3600.0)
    assert "walltime=72:00:00" in script("polaris", walltime_s=72 * 3600.0, queue="capacity")


def test_staging_separates_sets_of_one_name_copies_once_and_drops_hosts_that_cannot_take_them(
        tmp_path: Path) -> None:
    """Run the staging lines of the script for three hosts, each of which is a folder here."""
    for split in ("train", "val"):
        (tmp_path / split / "shards").mkdir(parents=True)
        (tmp_path / split / "shards" / "000.tar").write_text(f"{split} of 1")
    on_host = f"""env -C {tmp_path}/"$host" bash -c 'sleep 0.3; exec "$@"' sh"""
    site = load_profile("slurm").model_copy(update={"scratch": "${USER}", "on_host": on_host})
    config = load_config(RECIPE, [f"run.output_dir={tmp_path}/out",
                                  *(f"data.{split}={tmp_path}/{split}/shards" for split in ("train", "val"))])
    text = render(replace(JOB, stage=True, nodes=2), site, config)
    stage = text[text.index("\ncopy='"):text.index("\nfi\n") + 4]
    places = {split: place.replace("${USER}", "me")
              for split, place in re.findall(r'"data\.(train|val)=([^"]*)"', text)}
    for folder in ("n1", "n2", "n3", "state"):
        (tmp_path / folder).mkdir()
    (tmp_path / "n2" / "me").touch()  # where its scratch folder would be

    def staged(*hosts: str, begin: str = "stop_requested=0") -> str:
        """Stage for ``hosts``; return the lines left in the hostfile, or the exit code of a failure."""
        lines = "".join(f"{host} slots=4\\n" for host in hosts)
        lines = f"{begin}\nstate={tmp_path}/state\nhostfile=$state/hosts\nprintf '{lines}' > $hostfile\n{stage}"
        done = subprocess.run(["bash", "-uc", f"{lines}\ncat $hostfile"], text=True, capture_output=True,
                              env=os.environ | {"USER": "me"})
        if done.returncode:
            assert "prelora job: staging timed out or succeeded on too few nodes" in done.stdout
            return str(done.returncode)
        for host in ("n1", "n3"):
            for split, place in places.items():
                copy, = (tmp_path / host / place).iterdir()
                assert copy.name == "000.tar" and copy.read_text() == f"{split} of 1"
        return done.stdout

    left = "n1 slots=4\nn3 slots=4\n"
    assert staged("n1", "n2", "n3") == "prelora job: staging failed on n2 slots=4\n" + left
    (tmp_path / "n1" / places["val"] / "000.tar").write_text("va")  # cut short, and newer
    (tmp_path / "n1" / places["train"] / "000.tar").chmod(0o444)
    assert staged("n1", "n3") == left
    assert staged("n1", "n2") == "75", "too few are left"
    copy = tmp_path / "n1" / places["val"] / "000.tar"
    copy.unlink()
    warned = "stop_requested=0; trap stop_requested=1 USR1; (sleep 0.1; kill -USR1 $$) &"
    assert staged("n1", "n3", begin=warned) == "75", "no time is left to train"
    assert copy.exists(), "it did not wait for the copies"


def test_a_url_is_unchanged_and_cannot_be_staged() -> None:
    config = load_config(RECIPE, ["run.output_dir=/s/out", "data.train=https://host/train", "data.val=/s/val"])
    text = render(JOB, load_profile("polaris"), config)
    assert " data.train=https://host/train data.val=/s/val" in text
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        render(replace(JOB, stage=True), load_profile("polaris"), config)


def test_a_chain_ends_at_max_jobs() -> None:
    assert '[ "$jobs_before" -lt 49 ]' in script("slurm") and '[ "$jobs_before" -lt 0 ]' in script("slurm", max_jobs=1)


def test_a_profile_directive_with_an_unknown_placeholder_is_refused() -> None:
    site = load_profile("slurm").model_copy(update={"directives": ("--partition={{ partition }}",)})
    with pytest.raises(ConfigError, match="'partition' is undefined"):
        render(JOB, site, load_config(RECIPE, ["run.output_dir=/o", "data.train=/t", "data.val=/v"]))


def test_a_profile_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((PROFILES / "slurm.yaml").read_text() + "colour: red\n")
    with pytest.raises(ConfigError, match="colour"):
        load_profile(str(path))
    assert isinstance(load_profile("slurm"), Profile)


@pytest.mark.parametrize(("changes", "key"), [
    ({"container": "apptainer exec\nimage.sif"}, "--container"), ({"setup": ["echo a\necho b"]}, "--setup"),
    ({"setup": ['echo "open']}, "--setup, --container"), ({"container": "exec 'image.sif"}, "--setup, --container"),
    ({"setup": ["if true; then"]}, "--setup, --container")])
def test_lines_that_would_break_the_script_are_refused(changes: dict, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        script("slurm", **changes)
    assert refused.value.key == key
