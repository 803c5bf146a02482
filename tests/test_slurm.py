"""A real Slurm of one node, started here; skipped, visibly, where it is not installed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
from fewshotmeta.data.files import read_json
from fewshotmeta.lab.locks import marker
from fewshotmeta.training.checkpoints import read_checkpoint
from test_batches import (
    SLOW,
    TRACE,
    batch,
    executed,
    fewshotmeta,
    first,
    heedful,
    kinds,
    outcome,
    seeds,
    started,
    traces,
    training,
    until,
    until_begun,
)

pytestmark = pytest.mark.xdist_group('slurm')  # one machine has one Slurm
INSTALL = 'apt-get install --no-install-recommends slurmctld slurmd slurm-client munge'
CONFIG = '''ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port1}
AuthType=auth/munge
AuthInfo=socket={d}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=2
MpiDefault=none
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=2,batch_sched_delay=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
'''


ARGS = ('--executor', 'slurm', '--slurm', 'time=10', 'cpus_per_task=1')


def said(*args):
    "What a command of Slurm's prints."
    return subprocess.run(args, capture_output=True, text=True).stdout


@contextlib.contextmanager
def daemon(*args):
    "A process in the background, ended at the end."
    p = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        p.terminate()
        p.wait(20)


def open_to_slurm(folder, base):
    "Let Slurm's own user read a folder of pytest's."
    folder.chmod(0o755)
    for p in folder.parents:
        if p.stat().st_mode & 0o005 != 0o005 and p.is_relative_to(base):
            p.chmod(p.stat().st_mode | 0o055)


def write_settings(folder):
    "Write a cluster's key and configuration."
    for name in ('spool', 'state'):
        (folder / name).mkdir()
    (folder / 'munge.key').write_bytes(os.urandom(1024))
    (folder / 'munge.key').chmod(0o400)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    host = socket.gethostname().split('.')[0]
    text = CONFIG.format(host=host, d=folder, port=port, port1=port + 1)
    (folder / 'slurm.conf').write_text(text)


def node_is_idle():
    return 'idle' in said('sinfo', '-h', '-o', '%t')


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    "A cluster of one node."
    if os.geteuid():
        pytest.skip('no Slurm: this one-node cluster is started by root')
    if not all(shutil.which(c) for c in ('slurmctld', 'slurmd', 'sbatch', 'munged')):
        pytest.skip(f'no Slurm: on a Debian, `{INSTALL}`')
    folder = tmp_path_factory.mktemp('slurm')
    open_to_slurm(folder, tmp_path_factory.getbasetemp().parent)
    write_settings(folder)
    files = {'key-file': 'munge.key', 'socket': 'munge.sock', 'pid-file': 'munged.pid'}
    files |= {'log-file': 'munged.log', 'seed-file': 'munged.seed'}
    munge = [f'--{option}={folder / name}' for option, name in files.items()]
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv('SLURM_CONF', str(folder / 'slurm.conf'))
        stack.enter_context(daemon('munged', '-F', '--force', *munge))
        until((folder / 'munge.sock').exists, 20)
        for name in ('slurmctld', 'slurmd'):
            stack.enter_context(daemon(name, '-D', '-c'))
        until(node_is_idle, 60)
        yield folder


def jobs():
    "The queue: each job and its state."
    return dict(line.split() for line in said('squeue', '-h', '-r', '-o', '%i %T').splitlines())


def test_a_batch_by_slurm(slurm, batch):
    "An array of jobs; one fails and is recorded; the same again has only that one to do."
    runs = dict(a=dict(seed=[0, 1]))
    path = batch(runs | dict(bad=dict(name='raise')))
    out = executed(path, *ARGS)
    assert out.returncode == 1, out.stdout + out.stderr
    assert '3 runs: 2 done, 1 failed' in out.stdout, out.stdout + out.stderr
    done = dict(a_smoke_seed0='done', a_smoke_seed1='done')
    assert kinds(path) == done | dict(bad_smoke='failed')
    assert sorted(traces(path)) == [*seeds(2), 'bad_smoke']
    batch(runs | dict(bad=dict(name='fine')))
    out = executed(path, *ARGS)
    assert out.returncode == 0, out.stdout + out.stderr
    assert len(traces(path)) == 4, out.stdout + out.stderr


def test_a_stopped_batch_leaves_its_jobs_and_finds_them_again(slurm, batch):
    path = batch(dict(a=dict(seed=[0, 1, 2])), cells=SLOW)
    p = started(path, '--jobs', '1', *ARGS, preexec_fn=heedful)
    until_begun(path)
    p.send_signal(signal.SIGINT)
    assert 'the jobs stay in the queue' in p.communicate(timeout=60)[1]
    assert p.returncode == 130
    assert len(jobs()) >= 2
    out = executed(path, *ARGS)
    assert out.returncode == 0, out.stdout + out.stderr
    assert sorted(traces(path)) == seeds(3), out.stdout + out.stderr


HANG_OR_KILL = '''
if name == "hang":
    time.sleep(600)
if name == "kill":
    time.sleep(2)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
'''


def test_a_job_that_is_cancelled_and_one_that_the_node_kills(slurm, batch):
    "scancel is no failure: the next batch makes the run; a worker's death is recorded."
    runs = dict(a=dict(name='hang'), b=dict(name='kill'))
    path = batch(runs, cells=(TRACE, HANG_OR_KILL))
    folder = path.parent / 'runs'
    p = started(path, *ARGS)
    until(lambda: (path.parent / 'traces').exists() and 'a_smoke' in traces(path))
    until(lambda: 'running' in fewshotmeta('status', path, '--runs', folder).stdout, 20)
    subprocess.run(['scancel', next(j for j in jobs() if j.endswith('_0'))], check=True)
    out = p.communicate(timeout=120)[0]
    assert p.returncode == 1, out
    assert kinds(path)['a_smoke'] in ('waiting', 'stopped'), out  # it had saved nothing
    assert kinds(path)['b_smoke'] == 'failed', out
    assert 'Slurm ended job' in read_json(folder / 'table/b_smoke/failed.json')['error'], out


def test_what_slurm_refuses_is_said(slurm, batch):
    out = executed(batch(dict(a={})), '--executor', 'slurm', '--slurm', 'partition=nowhere')
    assert out.returncode == 2, out.stderr
    assert 'Slurm did not take the jobs' in out.stderr
    assert 'Traceback' not in out.stderr


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "The experiment, executed once, by the runner alone."
    path = training(tmp_path_factory.mktemp('undisturbed'), ['maml'], iterations=150)
    out = executed(path)
    assert out.returncode == 0, out.stdout + out.stderr
    return outcome(first(path).folder)


WAYS = dict(requeued=['scontrol', 'requeue'], preempted=['scancel', '--signal=USR2'])
WAITING = ('PENDING', 'REQUEUED', 'COMPLETING', 'CONFIGURING')


def iteration(p):
    "How far a run's checkpoint is; 0 without one."
    if not (p.folder / 'checkpoint.safetensors').exists():
        return 0
    return read_checkpoint(p.folder)[0]['iteration']


def taken_back(p, how):
    "Take the node back from a run in its middle; its job."
    until(lambda: iteration(p) >= 10)
    job = read_json(marker(p.runs, p.experiment, p.slug, 'job.json'))['job']
    assert jobs()[job] == 'RUNNING'
    subprocess.run([*how, job], check=True)
    return job


def test_taken_back_by_the_cluster_in_mid_run(slurm, undisturbed, tmp_path, record):
    "`scontrol requeue` kills a job and queues it; on USR2 submitit does so: the same bytes."
    batches, runs, job_of = {}, {}, {}
    for way in WAYS:
        (tmp_path / way).mkdir()
        path = training(tmp_path / way, ['maml'], iterations=150)
        batches[way], runs[way] = started(path, *ARGS), first(path)
    for way, how in WAYS.items():
        job_of[way] = taken_back(runs[way], how)
    for way, job in job_of.items():
        until(lambda: jobs().get(job) in WAITING, 90)
        assert not (runs[way].folder / 'result.json').exists(), way
        assert 10 <= iteration(runs[way]) < 150, way
        subprocess.run(['scontrol', 'release', job], capture_output=True)
    for way, b in batches.items():
        for _ in range(60):  # Slurm lets a requeued job wait two minutes: ask for it now
            said('scontrol', 'update', f'jobid={job_of[way]}', 'starttime=now')
            if b.poll() is not None or (runs[way].folder / 'result.json').exists():
                break
            time.sleep(3)
        out = b.communicate(timeout=120)
        assert b.returncode == 0 and '1 runs: 1 done' in out[0], (way, out)
        assert outcome(runs[way].folder) == undisturbed, way
        record(f'Slurm: job {way} in mid-run, finished with the same bytes', runs=1, identical=1)
