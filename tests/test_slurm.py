"""A real Slurm of one node, from the system's packages: installed and started here, skipped, visibly, where that cannot be."""

import os, shutil, signal, socket, subprocess, time
import pytest, yaml
from conftest import ROOT
from fewshotmeta.data.files import read_json
from test_batches import (
    SLOW,
    TRAIN,
    batch,
    command,
    fewshotmeta,
    heedful,
    kinds,
    outcome,
    traces,
    until,
)

pytestmark = pytest.mark.xdist_group('slurm')  # one machine has one Slurm
PACKAGES = ('slurmctld', 'slurmd', 'slurm-client', 'munge')
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


def installed():
    "Why there is no Slurm; nothing if there is."
    if all(shutil.which(c) for c in ('slurmctld', 'slurmd', 'sbatch', 'munged')):
        return
    if os.geteuid() or not shutil.which('apt-get'):
        return 'Slurm is not installed, and only root on a Debian can install it'
    env = os.environ | dict(DEBIAN_FRONTEND='noninteractive')
    for args in (['update', '-qq'], ['install', '-y', '-qq', '--no-install-recommends', *PACKAGES]):
        done = subprocess.run(['apt-get', *args], capture_output=True, text=True, env=env)
        if done.returncode:
            return f'Slurm cannot be installed: {done.stderr.strip()[-200:]}'


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    if os.geteuid():
        pytest.skip('no Slurm: this one-node cluster is started by root')
    if why := installed():
        pytest.skip(f'no Slurm: {why}')
    d = tmp_path_factory.mktemp('slurm')
    d.chmod(0o755)
    for p in d.parents:
        if p.stat().st_mode & 0o005 != 0o005 and str(p).startswith(
            str(tmp_path_factory.getbasetemp().parent)
        ):
            p.chmod(p.stat().st_mode | 0o055)
    for s in ('spool', 'state'):
        (d / s).mkdir()
    (d / 'munge.key').write_bytes(os.urandom(1024))
    (d / 'munge.key').chmod(0o400)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    (d / 'slurm.conf').write_text(
        CONFIG.format(host=socket.gethostname().split('.')[0], d=d, port=port, port1=port + 1)
    )
    old = os.environ.get('SLURM_CONF')
    os.environ['SLURM_CONF'] = str(d / 'slurm.conf')
    daemons = [
        subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for c in (
            [
                'munged',
                '-F',
                '--force',
                f'--key-file={d}/munge.key',
                f'--socket={d}/munge.sock',
                f'--pid-file={d}/munged.pid',
                f'--log-file={d}/munged.log',
                f'--seed-file={d}/munged.seed',
            ],
        )
    ]
    try:
        until(lambda: (d / 'munge.sock').exists(), 20)
        daemons += [
            subprocess.Popen([c, '-D', '-c'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for c in ('slurmctld', 'slurmd')
        ]
        until(
            lambda: (
                'idle'
                in subprocess.run(
                    ['sinfo', '-h', '-o', '%t'], capture_output=True, text=True
                ).stdout
            ),
            60,
        )
        yield d
    finally:
        for p in reversed(daemons):
            p.terminate()
            p.wait(20)
        os.environ.pop('SLURM_CONF') if old is None else os.environ.__setitem__('SLURM_CONF', old)


ARGS = ('--executor', 'slurm', '--slurm', 'time=10', 'cpus_per_task=1')


def jobs():
    return dict(
        l.split()
        for l in subprocess.run(
            ['squeue', '-h', '-r', '-o', '%i %T'], capture_output=True, text=True
        ).stdout.splitlines()
    )


def test_a_batch_by_slurm(slurm, batch):
    "An array of jobs; one fails and is recorded, the others finish; the same command again has nothing to do but the failed one."
    path = batch(dict(a=dict(seed=[0, 1]), bad=dict(name='raise')))
    out = fewshotmeta('batch', path, '--runs', path.parent / 'runs', *ARGS)
    assert out.returncode == 1 and '3 runs: 2 done, 1 failed' in out.stdout, out.stdout + out.stderr
    assert kinds(path) == dict(
        a_smoke_seed0='done', a_smoke_seed1='done', bad_smoke='failed'
    ) and sorted(traces(path)) == ['a_smoke_seed0', 'a_smoke_seed1', 'bad_smoke']
    batch(dict(a=dict(seed=[0, 1]), bad=dict(name='fine')))
    out = fewshotmeta('batch', path, '--runs', path.parent / 'runs', *ARGS)
    assert out.returncode == 0 and len(traces(path)) == 4, out.stdout + out.stderr


def test_a_stopped_batch_leaves_its_jobs_and_finds_them_again(slurm, batch, tmp_path):
    path = batch(dict(a=dict(seed=[0, 1, 2])), cells=SLOW)
    p = subprocess.Popen(
        command('batch', path, '--runs', tmp_path / 'runs', '--jobs', '1', *ARGS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heedful,
    )
    until(lambda: (tmp_path / 'traces').exists())
    p.send_signal(signal.SIGINT)
    assert (
        'the jobs stay in the queue' in p.communicate(timeout=60)[1]
        and p.returncode == 130
        and len(jobs()) >= 2
    )
    out = fewshotmeta('batch', path, '--runs', tmp_path / 'runs', *ARGS)
    assert out.returncode == 0 and sorted(traces(path)) == [f'a_smoke_seed{i}' for i in range(3)], (
        out.stdout + out.stderr
    )


def test_a_job_that_is_cancelled_and_one_that_the_node_kills(slurm, batch, tmp_path):
    "scancel is no failure: the next batch makes the run; a worker that dies is recorded with what Slurm says. And what Slurm refuses is said."
    path = batch(
        dict(a=dict(name='hang'), b=dict(name='kill')),
        cells=(
            SLOW[0],
            'if name == "hang": time.sleep(600)\nif name == "kill":\n    time.sleep(2); os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)',
        ),
    )
    p = subprocess.Popen(
        command('batch', path, '--runs', tmp_path / 'runs', *ARGS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: (tmp_path / 'traces').exists() and 'a_smoke' in traces(path))
    until(lambda: 'running' in fewshotmeta('status', path, '--runs', tmp_path / 'runs').stdout, 20)
    subprocess.run(['scancel', next(j for j in jobs() if j.endswith('_0'))], check=True)
    out = p.communicate(timeout=120)[0]
    assert p.returncode == 1 and kinds(path)['a_smoke'] in ('waiting', 'stopped'), (
        out
    )  # it had saved nothing
    assert (
        kinds(path)['b_smoke'] == 'failed'
        and 'Slurm ended job'
        in read_json(tmp_path / 'runs' / 'table' / 'b_smoke' / 'failed.json')['error']
    ), out
    out = fewshotmeta(
        'batch',
        path,
        '--runs',
        tmp_path / 'runs',
        '--executor',
        'slurm',
        '--slurm',
        'partition=nowhere',
    )
    assert (
        out.returncode == 2
        and 'Slurm did not take the jobs' in out.stderr
        and 'Traceback' not in out.stderr
    ), out.stderr


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "The experiment, executed once, by the runner alone."
    path, p = experiment(tmp_path_factory.mktemp('undisturbed'))
    subprocess.run(
        command('batch', path, '--runs', path.parent.parent / 'runs'),
        check=True,
        capture_output=True,
    )
    return outcome(p.folder)


def experiment(tmp_path):
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'nbs' / 'train.ipynb').write_bytes(
        (ROOT / 'nbs' / 'experiments' / 'train.ipynb').read_bytes()
    )
    (tmp_path / 'nbs' / 'one.yaml').write_text(
        yaml.dump(
            dict(
                experiment='train.ipynb',
                common=TRAIN | dict(iterations=150),
                runs=dict(maml=dict(method='maml')),
                scales=dict(smoke={}),
            )
        )
    )
    return tmp_path / 'nbs' / 'one.yaml', read_one(tmp_path)


def read_one(tmp_path):
    from fewshotmeta.lab.batches import read_batch

    return read_batch(tmp_path / 'nbs' / 'one.yaml', runs=tmp_path / 'runs')[0]


@pytest.mark.xdist_group('taken back')  # `undisturbed` is made once
@pytest.mark.parametrize('how', ['requeued', 'preempted'])
def test_taken_back_by_the_cluster_in_mid_run(slurm, undisturbed, tmp_path, record, how):
    "`scontrol requeue` kills the job and queues it again; a preemption's signal (USR2) makes submitit do so. Either way: the same bytes as undisturbed."
    from fewshotmeta.training.checkpoints import read_checkpoint

    path, p = experiment(tmp_path)
    b = subprocess.Popen(
        command('batch', path, '--runs', tmp_path / 'runs', *ARGS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint = p.folder / 'checkpoint.safetensors'
    until(lambda: checkpoint.exists() and read_checkpoint(p.folder)[0]['iteration'] >= 10)
    ((job, state),) = jobs().items()
    assert state == 'RUNNING'
    subprocess.run(
        ['scontrol', 'requeue', job] if how == 'requeued' else ['scancel', '--signal=USR2', job],
        check=True,
    )
    until(
        lambda: (
            list(jobs().values())
            and set(jobs().values()) <= {'PENDING', 'REQUEUED', 'COMPLETING', 'CONFIGURING'}
        ),
        60,
    )
    assert (
        not (p.folder / 'result.json').exists()
        and 10 <= read_checkpoint(p.folder)[0]['iteration'] < 150
    )
    subprocess.run(['scontrol', 'release', job], capture_output=True)
    for _ in range(60):  # Slurm lets a requeued job wait two minutes: ask for it now
        subprocess.run(['scontrol', 'update', f'jobid={job}', 'starttime=now'], capture_output=True)
        if b.poll() is not None or (p.folder / 'result.json').exists():
            break
        time.sleep(3)
    out = b.communicate(timeout=120)
    assert b.returncode == 0 and '1 runs: 1 done' in out[0], out
    assert outcome(p.folder) == undisturbed
    record(f'Slurm: job {how} in mid-run, finished with the same bytes', runs=1, identical=1)
