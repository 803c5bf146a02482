"""The small public things that notebooks and other tests use only through something larger, each by itself."""

import json, platform, subprocess, sys
from pathlib import Path
import pytest, torch
from fewshotmeta.all import *
from fewshotmeta.lab.command import main
from fewshotmeta.data.files import cache_folder, data_root, read_json
from fewshotmeta.training.bench import save_bench
from fewshotmeta.training.cases import CASES
from fewshotmeta.training.timing import conv_ceiling, interleaved


def test_folders_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('FEWSHOTMETA_CACHE', str(tmp_path / 'c'))
    monkeypatch.delenv('FEWSHOTMETA_DATA', raising=False)
    assert (cache_folder(), data_root(), data_root('x')) == (
        tmp_path / 'c',
        tmp_path / 'c' / 'data',
        Path('x').absolute(),
    )
    monkeypatch.setenv('FEWSHOTMETA_DATA', str(tmp_path / 'd'))
    assert data_root() == tmp_path / 'd'
    monkeypatch.delenv('FEWSHOTMETA_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_folder() == tmp_path / 'fewshotmeta'


@pytest.mark.parametrize(
    'given, said',
    [
        ((7, 1), 'size=7'),
        ((28, 2), 'channels=2'),
        ((28, 1, 'cubic'), "resize='cubic'"),
        ((28, 1, 'nearest', 0.9), 'margin=0.9'),
    ],
)
def test_what_no_image_can_be_made_of(given, said):
    check_pixels(28, 3, 'bilinear', 1.15)
    with pytest.raises(ValueError, match=said):
        check_pixels(*given)


def test_a_choice_names_all_choices():
    pick('mode', 'a', ('a', 'b'))
    with pytest.raises(ValueError, match="mode='c': choose one of 'a', 'b'"):
        pick('mode', 'c', ('a', 'b'))


def test_values_are_of_the_type_of_the_default():
    n = Parameter('n_way', 5, 'classes')
    assert (
        check_value(n, 7) == 7
        and check_value(Parameter('rate', 0.1, ''), 1) == 1.0
        and check_value(Parameter('ways', [1], ''), (2, 3)) == [2, 3]
    )
    for value in (True, 7.0, '7', None):
        with pytest.raises(BadParameters, match='expected int'):
            check_value(n, value)


def test_kept_memory_says_whether_it_could():
    "In a process of its own: it changes the allocator."
    said = subprocess.run(
        [
            sys.executable,
            '-c',
            'from fewshotmeta.engine.plans import keep_memory; print(keep_memory())',
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert said == str(platform.libc_ver()[0] == 'glibc')


def test_what_meta_loss_and_meta_gradient_hold(noise_bank):
    sampler = EpisodeSampler(noise_bank, 5, 1, 2, seed=0)
    learner, ep = MAML(conv4(size=16, filters=4), 5), sampler[0:3]
    out, grad = learner.meta_loss(ep), meta_gradient(learner, ep)
    assert (
        isinstance(out, MetaLoss)
        and isinstance(grad, MetaGradient)
        and out.loss.shape == out.accuracy.shape == (3,)
    )
    assert float(grad.loss) == pytest.approx(float(out.loss.mean().detach()), rel=1e-5) and [
        g.shape for g in grad.grads
    ] == [p.shape for p in learner.theta.values()]


def test_an_evaluation_is_its_last_step(noise_bank):
    e = evaluate(
        MAML(conv4(size=16, filters=4), 5, inner_steps=2),
        EpisodeSampler(noise_bank, 5, 1, 2, seed=0),
        n=4,
    )
    assert (
        isinstance(e, Evaluation)
        and (e.mean, e.ci95) == tuple(e.by_step[-1])
        and len(e.by_step) == 3
        and e.n == 4
        and e.transductive
    )


def test_heads_without_a_number_of_ways():
    assert (
        NoHead().fresh(8, 'linear', None) == {}
        and NoHead().n_way is None
        and TrainingClasses(64).n_way is None
    )
    with pytest.raises(ValueError, match='n_classes=1'):
        TrainingClasses(1)
    assert isinstance(anyway_hypermaml(conv4(size=16, filters=4)), AnyWayHyperMAML) and isinstance(
        FeatureTransfer(conv4(size=16, filters=4), 10), Pretrained
    )


def test_the_scale_of_baseline_pp():
    assert [chen2019_scale(n) for n in (64, 200, 201)] == [2.0, 2.0, 10.0]


def test_a_checkpoint_of_another_run_is_refused(noise_bank, tmp_path):
    def make():
        return MAML(conv4(size=16, filters=4), 5)

    sampler = EpisodeSampler(noise_bank, 5, 1, 2, seed=0)
    run = fit(make(), sampler, 2, meta_batch=1, checkpoint=tmp_path, progress=False)
    config = read_checkpoint(tmp_path)[0]['config']
    again = make()
    other = Run(again, torch.optim.Adam(again.theta.values()))
    load_checkpoint(other, tmp_path, config)
    assert other.iteration == 2 and all(
        torch.equal(a, b) for a, b in zip(run.learner.theta.values(), again.theta.values())
    )
    with pytest.raises(BadCheckpoint, match='another run'):
        load_checkpoint(other, tmp_path, config | {next(iter(config)): 'else'})
    note_progress(tmp_path, run, 5)
    left = read_json(tmp_path / '.progress.json')
    assert (left['iteration'], left['iterations']) == (2, 5)


def test_what_looks_at_values_cannot_be_recorded():
    assert issubclass(CannotRecord, ValueError)
    with pytest.raises(CannotRecord):
        Recorded(lambda x: [x if float(x.sum()) > 0 else -x], [], [torch.ones(2)])


def test_a_protocol_says_what_it_fixes():
    assert (
        isinstance(SETTINGS['hypermaml2022'], Protocol)
        and len(SETTINGS['antoniou2018'].splits) == 3
    )


def test_runs_know_their_project_and_the_package(tmp_path):
    root = Path(__file__).parent.parent
    assert (
        project_folder(root / 'nbs' / 'experiments' / 'train.ipynb') == root
        and project_folder(tmp_path / 'x.ipynb') == Path.cwd()
    )
    before = package_digest()
    package_digest.cache_clear()
    assert package_digest() == before and len(before) >= 12


def test_a_planned_run_and_its_state(tmp_path):
    planned = read_batch(
        Path(__file__).parent.parent / 'nbs' / 'experiments' / 'hypermaml_f1.yaml',
        'smoke',
        runs=tmp_path,
    )
    assert all(isinstance(p, Planned) for p in planned) and slurm_queue(planned) == {}
    s = state_of(planned[0])
    assert not s.done and planned[0].name in describe_state(planned[0], s)


def test_a_worker_needs_its_orders(tmp_path):
    with pytest.raises(FileNotFoundError):
        Work()(str(tmp_path / 'no_orders.json'))


def test_timing_in_turns(tmp_path):
    case = CASES[0].__class__('small', tasks=1, filters=4, n_query=1, size=16)
    times = interleaved([('ours', False), ('plain loop', False)], case, rounds=2, warmup=0)
    assert {k[0]: len(v) for k, v in times.items()} == {'ours': 2, 'plain loop': 2} and min(
        map(min, times.values())
    ) > 0
    assert conv_ceiling(rounds=1) > 0
    result = json.loads(
        (Path(__file__).parent.parent / 'runs' / 'speed' / 'cpu' / 'bench.json').read_text()
    )
    save_bench(result, tmp_path)
    assert (
        json.loads((tmp_path / 'bench.json').read_text()) == result
        and (tmp_path / 'bench.png').stat().st_size > 10_000
    )


def test_the_command_says_its_versions(capsys):
    with pytest.raises(SystemExit) as e:
        main(['--version'])
    assert (
        e.value.code == 0
        and 'torch' in (said := capsys.readouterr().out)
        and said.startswith('fewshotmeta ')
    )
