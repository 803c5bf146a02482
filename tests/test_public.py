"""Small public things that are elsewhere used only through something larger, each by itself."""

import json
import platform
from pathlib import Path

import forks
import pytest
import torch

from fewshotmeta.all import *
from fewshotmeta.data.files import cache_folder, data_root, read_json
from fewshotmeta.lab.command import main
from fewshotmeta.training.cases import CASES
from fewshotmeta.training.timing import conv_ceiling, interleaved
from fewshotmeta.training.bench import save_bench

ROOT = Path(__file__).parent.parent


def small():
    "A MAML that costs nothing, for images of 16×16."
    return MAML(conv4(size=16, filters=4), 5)


def test_folders_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('FEWSHOTMETA_CACHE', str(tmp_path / 'c'))
    monkeypatch.delenv('FEWSHOTMETA_DATA', raising=False)
    assert cache_folder() == tmp_path / 'c'
    assert data_root() == tmp_path / 'c' / 'data'
    assert data_root('x') == Path('x').absolute()
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
    assert check_value(n, 7) == 7
    assert check_value(Parameter('rate', 0.1, ''), 1) == 1.0
    assert check_value(Parameter('ways', [1], ''), (2, 3)) == [2, 3]
    for value in (True, 7.0, '7', None):
        with pytest.raises(BadParameters, match='expected int'):
            check_value(n, value)


def test_kept_memory_says_whether_it_could():
    "In a process of its own: it changes the allocator."
    code = 'from fewshotmeta.engine.plans import keep_memory; print(keep_memory())'
    said = forks.run(code).stdout.strip()
    assert said == str(platform.libc_ver()[0] == 'glibc')


def test_what_meta_loss_and_meta_gradient_hold(noise_bank):
    sampler = EpisodeSampler(noise_bank, 5, 1, 2, seed=0)
    learner, ep = small(), sampler[0:3]
    out, grad = learner.meta_loss(ep), meta_gradient(learner, ep)
    assert isinstance(out, MetaLoss) and isinstance(grad, MetaGradient)
    assert out.loss.shape == out.accuracy.shape == (3,)
    assert float(grad.loss) == pytest.approx(float(out.loss.mean().detach()), rel=1e-5)
    assert [g.shape for g in grad.grads] == [p.shape for p in learner.theta.values()]


def test_an_evaluation_is_its_last_step(noise_bank):
    learner = MAML(conv4(size=16, filters=4), 5, inner_steps=2)
    e = evaluate(learner, EpisodeSampler(noise_bank, 5, 1, 2, seed=0), n=4)
    assert isinstance(e, Evaluation)
    assert (e.mean, e.ci95) == tuple(e.by_step[-1])
    assert (len(e.by_step), e.n, e.transductive) == (3, 4, True)


def test_heads_without_a_number_of_ways():
    assert NoHead().fresh(8, 'linear', None) == {}
    assert NoHead().n_way is None
    assert TrainingClasses(64).n_way is None
    with pytest.raises(ValueError, match='n_classes=1'):
        TrainingClasses(1)
    net = conv4(size=16, filters=4)
    assert isinstance(anyway_hypermaml(net), AnyWayHyperMAML)
    assert isinstance(FeatureTransfer(net, 10), Pretrained)


def test_the_scale_of_baseline_pp():
    assert [chen2019_scale(n) for n in (64, 200, 201)] == [2.0, 2.0, 10.0]


def test_a_checkpoint_of_another_run_is_refused(noise_bank, tmp_path):
    sampler = EpisodeSampler(noise_bank, 5, 1, 2, seed=0)
    run = fit(small(), sampler, 2, meta_batch=1, checkpoint=tmp_path, progress=False)
    config = read_checkpoint(tmp_path)[0]['config']
    again = small()
    other = Run(again, torch.optim.Adam(again.theta.values()))
    load_checkpoint(other, tmp_path, config)
    assert other.iteration == 2
    assert all(torch.equal(p, again.theta[k]) for k, p in run.learner.theta.items())
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
    assert isinstance(SETTINGS['hypermaml2022'], Protocol)
    assert len(SETTINGS['antoniou2018'].splits) == 3


def test_runs_know_their_project_and_the_package(tmp_path):
    assert project_folder(ROOT / 'nbs' / 'experiments' / 'train.ipynb') == ROOT
    assert project_folder(tmp_path / 'x.ipynb') == Path.cwd()
    before = package_digest()
    package_digest.cache_clear()
    assert package_digest() == before and len(before) >= 12


def test_a_planned_run_and_its_state(tmp_path):
    batch = ROOT / 'nbs' / 'experiments' / 'hypermaml_f1.yaml'
    planned = read_batch(batch, 'smoke', runs=tmp_path)
    assert all(isinstance(p, Planned) for p in planned)
    assert slurm_queue(planned) == {}
    s = state_of(planned[0])
    assert not s.done
    assert planned[0].name in describe_state(planned[0], s)


def test_a_worker_needs_its_orders(tmp_path):
    with pytest.raises(FileNotFoundError):
        Work()(str(tmp_path / 'no_orders.json'))


def test_timing_in_turns(tmp_path):
    case = CASES[0].__class__('small', tasks=1, filters=4, n_query=1, size=16)
    times = interleaved([('ours', False), ('plain loop', False)], case, rounds=2, warmup=0)
    assert {k[0]: len(v) for k, v in times.items()} == {'ours': 2, 'plain loop': 2}
    assert min(map(min, times.values())) > 0
    assert conv_ceiling(rounds=1) > 0


def test_a_benchmark_is_kept_as_numbers_and_a_picture(tmp_path):
    result = json.loads((ROOT / 'runs' / 'speed' / 'cpu' / 'bench.json').read_text())
    save_bench(result, tmp_path)
    assert json.loads((tmp_path / 'bench.json').read_text()) == result
    assert (tmp_path / 'bench.png').stat().st_size > 10_000


def test_the_command_says_its_versions(capsys):
    with pytest.raises(SystemExit) as e:
        main(['--version'])
    said = capsys.readouterr().out
    assert e.value.code == 0
    assert said.startswith('fewshotmeta ') and 'torch' in said
