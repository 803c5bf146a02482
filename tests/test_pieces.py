"""Public pieces that one meets only through something larger, each by itself."""

import errno
import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from fewshotmeta.all import *

SMALL = dict(size=16, filters=4)


# --- data


def test_rooms_of_a_package_are_imported_in_order():
    names = [room.__name__ for room in import_rooms('fewshotmeta.learners')]
    assert names == sorted(names) and 'fewshotmeta.learners.maml' in names


def test_a_grid_has_as_many_rows_as_it_needs():
    axes = draw_grid([torch.zeros(1, 4, 4)] * 5, cols=3)
    assert axes.shape == (2, 3)


def test_safetensors_errors_become_the_systems():
    error = as_os_error(ValueError('No space left on device (os error 28)'), 'bank')
    assert error.errno == errno.ENOSPC and error.filename == 'bank'
    assert as_os_error(ValueError('else'), 'bank').errno == errno.EIO


def test_an_image_is_cut_or_squeezed_to_a_square():
    wide = Image.new('L', (40, 20), 0)
    wide.paste(255, (0, 0, 5, 20))  # a bright stripe that cutting out the centre loses
    assert fit_image(wide, 10, 'nearest').size == (10, 10)
    assert fit_image(wide, 10, 'nearest').getextrema() == (0, 0)
    assert fit_image(wide, 10, 'nearest', squash=True).getextrema() == (0, 255)


def test_folders_and_their_fingerprint(tmp_path):
    for name in ('b', 'a', '.hidden'):
        (tmp_path / name).mkdir()
    (tmp_path / 'file').write_text('x')
    assert class_folders(tmp_path) == ['a', 'b']
    before = fingerprint(tmp_path, [tmp_path / 'file'])
    (tmp_path / 'file').write_text('longer')
    assert fingerprint(tmp_path, [tmp_path / 'file']) != before


def test_a_streams_key_is_a_function_of_its_name():
    assert stream_key('a') == stream_key('a') != stream_key('b') and 0 <= stream_key('a') < 2**64


# --- engine


def test_cores_and_precision_without_a_gpu():
    assert 1 <= available_cores() <= os.cpu_count()
    with gpu_arithmetic('float32'):
        assert torch.ones(1).item() == 1


@pytest.mark.parametrize('precision', ['float32', 'tf32'])
def test_a_gpus_arithmetic_is_set_and_put_back(monkeypatch, precision):
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn

    def flags():
        return (
            products.allow_tf32,
            convolutions.allow_tf32,
            convolutions.deterministic,
            convolutions.benchmark,
        )

    monkeypatch.setattr(convolutions, 'benchmark', True)
    before, tf32 = flags(), precision == 'tf32'
    with gpu_arithmetic(precision):
        assert flags() == before  # there is none
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(KeyError), gpu_arithmetic(precision):
        assert flags() == (tf32, tf32, True, False)
        raise KeyError
    assert flags() == before


def test_many_tasks_are_convolved_each_by_its_own_weights():
    x, w = torch.randn(6, 2, 5, 5), torch.randn(3 * 4, 2, 3, 3)
    one = direct_convolution(1, 1, 1, x.dtype)
    y = convolve(x, w, EachTask(one, 3))
    for i in range(3):
        images, weights = x[2 * i : 2 * i + 2], w[4 * i : 4 * i + 4]
        alone = torch.nn.functional.conv2d(images, weights, padding=1)
        assert torch.allclose(y[2 * i : 2 * i + 2], alone, atol=1e-5)


def test_statistics_survive_being_spread_over_a_flat_dict():
    stats = {'norm1': (torch.zeros(2), torch.ones(2)), 'norm2': (torch.ones(1), torch.zeros(1))}
    flat = flatten_stats(stats) | {'conv1.weight': torch.zeros(1)}
    assert unflatten_stats(flat) == stats


@pytest.mark.parametrize('tasks, repeated', [(1, False), (1, True), (3, True)])
@pytest.mark.parametrize('recompute', [False, True])
def test_an_economical_loss_has_the_plain_gradient(tasks, repeated, recompute):
    p = dict(a=torch.randn(tasks, 4, dtype=torch.float64, requires_grad=True))

    def query(keep, p):
        return dict(loss=p['a'].exp().sum(1), other=p['a'])

    def gradient():
        out = economical(query, p, tasks=tasks, repeated=repeated)
        return torch.autograd.grad(out['loss'].sum(), p['a'])[0]

    found = plan_for('cpu', 'plain', recompute=recompute).run(gradient)
    assert torch.allclose(found, p['a'].detach().exp(), rtol=1e-12)


# --- learners


def test_what_each_norm_says_of_itself():
    said = {n.name: (n.transductive, n.stored, n.measured, n.from_support) for n in NORMS.values()}
    assert said['transductive'] == (True, False, True, False)
    assert said['support'] == (False, False, True, True)
    assert said['per_step'] == (False, True, False, False)
    assert said['affine_only'] == (False, False, False, False)
    assert PerStep() == NORMS['per_step'] and AffineOnly() == as_norm('affine_only')
    assert not Unnormalised().transductive and repr(Unnormalised()) == "'none'"


def test_reductions_of_the_inner_loss():
    assert mean_over_images(5) == 1 and sum_over_shots(5) == 5


def test_a_setting_gives_what_starts_parameters():
    setting = Setting(5, 64, everything, 'linear', 3)
    assert setting.fresh == dict(head_init='linear', seed=3)


def test_a_change_of_the_head_and_its_share():
    own, change = {'head.bias': torch.ones(1, 2)}, {'head.bias': torch.full((1, 2), 4.0)}
    assert add_change(own, change, 0.25)['head.bias'].tolist() == [[2, 2]]
    held = Held(0.25, SWITCHES['update_mix'])
    assert held(0.0) == held(0.9) == 0.25


def test_what_a_hypernetwork_is_shown():
    ys = torch.tensor([[0, 2]])
    assert label_number(ys, 3).tolist() == [[[0], [2]]]
    assert label_one_hot(ys, 3).int().tolist() == [[[1, 0, 0], [0, 0, 1]]]
    logits = torch.zeros(1, 1, 4)
    assert as_probabilities(logits).tolist() == [[[0.25] * 4]] and as_logits(logits) is logits


def test_where_a_warm_up_takes_its_gradient():
    own, start = object(), object()
    assert at_current(own, start) is own and at_start(own, start) is start
    assert WARM_GRADIENTS == dict(standard=at_current, through_start=at_start)


def test_phases_and_candidates_of_the_switch():
    assert [phase_of(p) for p in (1.0, 0.5, 0.0)] == ['before', 'within', 'after']
    assert PHASES['after'] is network_alone and PHASES['before'] is gradient_steps
    learner = HyperMAML(conv4(**SMALL), 3, width=8)
    assert pure_candidate(learner, 0.5) is None and pure_candidate(learner, 0.0) is learner
    assert mixture_candidate(learner, 0.5).switch(0.0) == 0.5


def test_the_master_after_an_outer_step():
    new, old, grad = torch.tensor([[2.0], [4.0], [9.0]]), torch.zeros(3, 1), torch.ones(3, 1)
    step = OuterStep(new, old, grad, lr=0.5, n_way=2)
    moved = {name: update(step).item() for name, update in MASTER_UPDATES.items()}
    expected = dict(row_mean_adam=3.0, row_mean_sgd=-0.5, tied_gradient=2.0, frozen=0.0)
    assert moved == expected


def test_losses_and_transforms_of_the_comparison_methods():
    logits, labels = torch.zeros(1, 2, 2), torch.tensor([[0, 1]])
    assert squashed_squares(logits, labels).tolist() == [0.25]
    h, mean = torch.tensor([[[3.0, 4.0]]]), torch.tensor([0.0, 4.0])
    assert unnormalised(h, mean) is h
    assert torch.allclose(unit_length(h, mean), torch.tensor([[[0.6, 0.8]]]))
    assert torch.allclose(centred_unit_length(h, mean), torch.tensor([[[1.0, 0.0]]]))


# --- training


def test_a_replayed_gradient_is_the_gradient(noise_bank):
    learner = to_dtype(MAML(conv4(**SMALL), 3, inner_steps=2), torch.float64)
    episodes = EpisodeSampler(noise_bank, 3, 1, 2)[0:3]
    episodes = Episodes(*(v.double() if v.is_floating_point() else v for v in episodes))
    ran = meta_gradient(learner, episodes, 0.0, plan_for('cpu', 'batched'))
    recorder = Recorder(learner, plan_for('cpu', 'graph', chunk=2))
    replayed = replayed_gradient(recorder, Episodes(*(v[:2] for v in episodes)), 0.0, 3)
    again = meta_gradient(learner, episodes[0:2], 0.0, plan_for('cpu', 'batched'))
    for a, b in zip(replayed.grads, again.grads):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert ran.loss != again.loss


def test_plain_values_of_a_configuration():
    assert plain_value(3) == 3 and plain_value(None) is None
    assert plain_value(everything) == 'everything' and plain_value(Cosine()) == repr(Cosine())


def test_a_head_is_trained_for_the_ways_it_was_made_for(noise_bank):
    sampler = EpisodeSampler(noise_bank, 4, 1, 1)
    check_trainable_ways(hidra(conv4(**SMALL), 4), sampler)
    with pytest.raises(ValueError, match='up to 4 ways.*n_max=3'):
        check_trainable_ways(hidra(conv4(**SMALL), 3), sampler)


def test_small_tasks_share_calls_where_learner_and_plan_say_so():
    xs = torch.zeros(2, 5, 1, 16, 16)
    learner = MAML(conv4(size=16, filters=16), 5)
    threads, plain = plan_for('cpu', 'threads'), plan_for('cpu', 'plain')
    shares = learner.backbone.shares_calls
    assert shared_pixels(learner, threads, xs) == (5 * 16 * 16 if shares else 0)
    assert shared_pixels(learner, plain, xs) == 0


def test_a_timed_method_and_a_candidate_say_what_they_can():
    assert isinstance(METHODS['maml'], TimedMethod) and METHODS['maml'].order == 2
    ours = CANDIDATES['ours']
    assert isinstance(ours, Candidate) and ours.can_run(CASES[0])
    assert not Candidate(prepare=None, cpu=False).can_run(CASES[0])
    assert not Candidate(prepare=None, package='no_such_package').can_run(CASES[0])


def test_a_meter_measures_in_a_process_of_its_own():
    case = CASES[0].__class__('small', tasks=1, filters=4, n_query=1, size=16)
    with Meter() as meter:
        assert meter.seconds('ours', case) > 0


# --- lab


def test_a_failure_is_forgotten(tmp_path):
    (tmp_path / 'table' / 'a').mkdir(parents=True)
    write_json(tmp_path / 'table' / 'a' / 'failed.json', dict(when='now'))
    assert last_failure(tmp_path, 'table', 'a')['when'] == 'now'
    forget_failure(tmp_path, 'table', 'a')
    assert last_failure(tmp_path, 'table', 'a') == {}


def test_a_metric_as_text():
    assert format_metric(dict(mean=0.5, ci95=0.01)) == '0.5000 ± 0.0100'
    assert format_metric(dict(mean=0.5, ci95=None)) == '0.5000'


def test_a_published_cell_as_text():
    cells = published('MPP-T1')
    printed = str(reference('MPP-T1', 'MAML++', '20-way 1-shot'))
    assert cell_text(cells, 'MAML++', '20-way 1-shot').startswith(printed)
    assert cell_text(cells, 'MAML++', 'no such column') == ''


def test_a_crew_without_runs_has_no_queue():
    crew = Crew([], Options())
    assert crew.queue() == {} and crew.jobs == []


def test_a_local_worker_heeds_the_batch_that_hired_it():
    work = LocalWork()
    assert work.goes_on(dict(batch=os.getpid()))
    assert not work.goes_on(dict(batch=2**22 + 1))


def test_a_worker_of_slurm_takes_the_run_of_its_number():
    work = SlurmWork()
    assert work.share(['a', 'b', 'c'], 1) == ['b'] and not work.taken
    work.heed(signal.SIGTERM, None)
    assert work.taken


def test_a_failure_while_the_cluster_takes_the_node_back_is_forgotten(tmp_path, monkeypatch):
    "Slurm kills the `scontrol requeue` that asks for it, too, which then looks like a failure."
    record, work = tmp_path / 'failed.json', SlurmWork()
    p, failure = SimpleNamespace(folder=tmp_path), RunFailed('scontrol died', 'CalledProcessError')
    record.write_text('{}')
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    work.after_failure(p, failure)
    assert record.exists()  # a failure of the notebook
    work.taken = True
    with pytest.raises(SystemExit, match='takes the node back'):
        work.after_failure(p, failure)
    assert not record.exists()


def test_what_stops_a_run_that_the_cluster_takes_back_is_no_failure_of_it(tmp_path, monkeypatch):
    "Whatever it looks like: `scontrol requeue`, killed where submitit asks for it in a handler."
    p, work = Planned('x', 'y', tmp_path / 'n.ipynb', {}, {}, tmp_path / 'runs'), SlurmWork()
    orders = dict(again=[], since='', limit=0, accept_changes=False)

    def killed(*_, **how):
        work.taken = True
        raise subprocess.CalledProcessError(-15, ['scontrol', 'requeue', '10'])

    monkeypatch.setattr('fewshotmeta.lab.work.run_notebook', killed)
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    with pytest.raises(SystemExit, match='takes the node back'):
        work.execute(p, orders)
    assert not p.folder.exists()
    assert Work().execute(p, orders)  # of another worker it is one
    assert read_json(p.folder / 'failed.json')['kind'] == 'CalledProcessError'
