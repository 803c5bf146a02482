"""The bench: candidates that compute the same, counts that are right, output that is whole.

No test looks at a clock.
"""

import json, os, platform, re, sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest, torch
from torch.utils.flop_counter import FlopCounterMode

from fewshotmeta.all import *
from fewshotmeta.lab.command import main
from fewshotmeta.training import bench as bench_room, timing as timing_room
from fewshotmeta.training.bench import ON_GPU, PAIRS, _line, _measure, _spread
from fewshotmeta.training.candidates import Candidate, keep_query_graphs, plain_net
from fewshotmeta.training.targets import _at_least, _at_most, _time_targets

SMALL = dict(tasks=2, size=16, filters=8, n_query=2)
LIBRARIES = {'learn2learn', 'higher'}


def in_float64(case):
    "The case's episodes, their images in float64."
    xs, ys, xq, yq = case.episodes()
    return Episodes(xs.double(), ys, xq.double(), yq)


def plain_backbone(case):
    return from_module(plain_net(case), case.channels, case.size)


def copy_parameters(source, target):
    with torch.no_grad():
        for a, b in zip(target.theta.values(), source.theta.values(), strict=True):
            a.copy_(b)


def assert_same(a, b):
    "Two meta-gradients are the same, up to rounding."
    for x, y in zip([a.loss, *a.grads], [b.loss, *b.grads], strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    'case',
    [
        Case('', **SMALL),
        Case('', 'first_order', steps=3, **SMALL),
        Case('', 'hypermaml', **SMALL),
        Case('', steps=2, channels=3, **SMALL),
    ],
)
def test_ours_and_the_plain_loop_compute_the_same(case):
    ours = to_dtype(case.learner(), torch.float64)
    plain = to_dtype(case.learner(plain_backbone(case)), torch.float64)
    copy_parameters(ours, plain)
    ep = in_float64(case)
    assert_same(meta_gradient(ours, ep), meta_gradient(plain, ep, plan=Plan('p', 1)))


def test_the_plain_loop_of_mamlpp_computes_the_same(monkeypatch):
    "With the same ingredients, and the graph of each query pass kept."
    case = Case('', 'mamlpp', steps=3, **SMALL)
    ep = in_float64(case)
    ours, plain = (
        to_dtype(mamlpp(net, 5, 3, ingredients=('msl', 'lslr')), torch.float64)
        for net in (conv4(1, 16, filters=8), plain_backbone(case))
    )
    copy_parameters(ours, plain)
    keep_query_graphs(plain)
    a = meta_gradient(ours, ep, 0.02)

    def never(*args):
        raise AssertionError('differentiated at once')

    # wherever the learner looks it up
    for place in ('fewshotmeta.engine.lean.at_once', 'fewshotmeta.learners.maml.at_once'):
        monkeypatch.setattr(place, never, raising=False)
    with pytest.raises(AssertionError, match='at once'):
        meta_gradient(ours, ep, 0.02, Plan('p', 1))
    assert_same(a, meta_gradient(plain, ep, 0.02, Plan('p', 1)))


@pytest.mark.parametrize(
    'case',
    [
        Case(''),
        Case('', 'first_order', steps=2),
        Case('', 'hypermaml'),
        Case('', channels=3, size=84, filters=48),
        Case('', n_way=3, k_shot=2, n_query=4),
    ],
)
def test_work_is_what_pytorch_counts(case):
    """Query and first-order support passes exactly.

    PyTorch's own second derivative computes more than it need, so MAML is counted in first order.
    """
    method = 'hypermaml' if case.method == 'hypermaml' else 'first_order'
    case = replace(case, tasks=1, method=method)
    with FlopCounterMode(display=False) as counter:
        meta_gradient(case.learner(), case.episodes(), plan=plan_for('cpu', 'plain'))
    counts = counter.get_flop_counts()['Global']
    counted = sum(flop for operation, flop in counts.items() if 'convolution' in str(operation))
    assert counted / 1e9 == pytest.approx(case.work(), rel=1e-6)


def test_second_order_work_by_hand():
    """A support pass differentiated twice.

    Three maps, the two derivatives of each of two of them, and the outer two.
    """
    first = Case('', 'first_order', tasks=1, filters=64).work()
    second = Case('', 'maml', tasks=1, filters=64).work()
    rest = sum(2 * 9 * s * s * 64 * 64 for s in (14, 7, 3)) / 1e9
    one = 2 * 9 * 28 * 28 * 64 / 1e9
    assert second - first == pytest.approx(5 * (6 * rest + 2 * one))


@pytest.mark.parametrize('name', CANDIDATES)
def test_every_candidate_runs_what_it_claims(name):
    candidate = CANDIDATES[name]
    for case in (
        Case('', **SMALL),
        Case('', 'mamlpp', steps=2, **SMALL),
        Case('', 'hypermaml', **SMALL),
        Case('', steps=2, adapt=True, **SMALL),
    ):
        if candidate.can_run(case):
            candidate.prepare(case, 'cpu')()
    elsewhere = LIBRARIES | {'ours, im2col', 'ours, inductor', 'ours, tf32', 'ours, bf16'}
    assert candidate.can_run(Case('')) or name in elsewhere


def ours_and_plain(pairs, device):
    "The candidates of these pairs that the device can run, apart from the libraries."
    names = {name for name, _ in pairs} - LIBRARIES
    return {name for name in names if CANDIDATES[name].can_run(Case(''), device)}


def test_each_device_has_its_candidates():
    """Worker threads are not timed on a GPU, nor a GPU's precision on a CPU.

    Between the two every candidate has its turn.
    """
    gpu, cpu = ours_and_plain(ON_GPU, 'cuda'), ours_and_plain(PAIRS, 'cpu')
    assert {'ours, tf32', 'ours, bf16'} <= gpu - cpu
    assert {'ours, together', 'ours, threads'} <= cpu - gpu
    assert {'ours', 'plain loop', 'ours, recomputed'} <= gpu & cpu
    assert gpu | cpu == set(CANDIDATES) - LIBRARIES


def row(case, candidate, ms, keep=False, share=0.5, peak=None):
    return dict(
        case=case, candidate=candidate, kept_memory=keep, ms=ms, share=share, peak_bytes=peak
    )


def verdicts(found):
    return [(target['value'], target['met']) for target in found]


def test_targets_of_a_gpu():
    rows = [
        row('16 tasks, 1 step', 'learn2learn', 50.0),
        row('16 tasks, 1 step', 'ours', 2.0),
        row('16 tasks, 5 steps', 'learn2learn', 50.0),
        row('16 tasks, 5 steps', 'ours', 5.0),
        row('16 tasks, 5 steps', 'ours, tf32', 4.0, share=0.35),
    ]
    assert verdicts(targets(dict(device='cuda', rows=rows, curves={}))) == [
        (25.0, True),
        (10.0, False),
        (None, None),
        (None, None),
        (0.35, True),
    ]


def test_what_was_not_measured_says_so():
    result = dict(device='cpu', rows=[], curves={})
    assert set(verdicts(targets(result))) == {(None, None)}
    assert 'not measured |' in show_targets(result)
    assert 'met |' not in show_targets(result)


def test_line_and_spread():
    line = dict(slope=2.0, intercept=3.0)
    assert _line([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx(line)
    assert _spread([0.001, 0.003, 0.002]) == pytest.approx(dict(ms=2.0, q1=1.0, q3=3.0, n=3))
    assert _spread([0.5])['ms'] == 500


def test_targets_compare_with_the_fastest_peer_as_it_comes():
    name = CASES[0].name
    rows = [
        row(name, 'ours', 40.0, peak=10),
        row(name, 'plain loop', 200.0, peak=40),
        row(name, 'higher', 160.0, peak=80),
        row(name, 'plain loop', 50.0, keep=True),
        dict(case=name, candidate='learn2learn', kept_memory=False, failed='no memory'),
    ]
    (out,) = _time_targets(dict(rows=rows), CASES[0])
    assert verdicts([out]) == [(0.25, True)]
    assert 'higher' in out['against']
    assert not _at_most('x', 1, 1.1)['met'] and _at_most('x', 2, 1.0)['met']
    assert not _at_least('x', 2, 1.0)['met']


def test_targets_compare_with_our_own_plans():
    (case,) = (c for c in CASES if c.size == 84)
    rows = [
        row(case.name, 'ours', 24.0),
        row(case.name, 'ours', 21.0, keep=True),
        row(case.name, 'ours, threads', 20.0),
        row(case.name, 'ours, together', 20.0, keep=True),
        row(case.name, 'higher', 100.0),
    ]
    out = _time_targets(dict(rows=rows), case)
    assert verdicts(out) == [(0.24, False), (1.2, False), (1.05, True)]


def test_bench_writes_a_whole_result(tmp_path, capsys):
    folder = tmp_path / 'speed'
    assert main(['bench', '--quick', '--out', str(folder)]) == 0
    result = json.loads((folder / 'bench.json').read_text())
    assert {r['candidate'] for r in result['rows']} == {'ours', 'ours, recomputed'}
    assert set(result['ceilings']) == {'float32'} and min(result['ceilings'].values()) > 1
    assert result['provenance']['versions']['torch']
    assert (folder / 'bench.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(p.name for p in folder.iterdir()) == ['bench.json', 'bench.png']
    assert 'tasks/s' in capsys.readouterr().out


@pytest.mark.parametrize(
    'argv,message',
    [
        (['--cases', 'MAMLpp'], 'no case matches.*16 tasks, 1 step'),
        (['--rounds', '0'], 'rounds=0'),
        (['--only', 'mine'], "no candidate matches 'mine': they are ours; "),
        (['--only', 'ours', '--without', 'our*'], 'leaves no candidate'),
        (['--device', 'mps'], 'device=mps: the bench knows cpu and cuda'),
    ],
)
def test_bad_input(argv, message, capsys, tmp_path):
    assert main(['bench', '--out', str(tmp_path), *argv]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_cuda_is_asked_for_in_vain(capsys):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    for device in 'cuda', 'cuda:1':
        assert main(['bench', '--device', device]) == 2
        assert f'device={device}, but PyTorch sees no GPU' in capsys.readouterr().err


# ---- candidates that fail, and some of them
def without_memory(case, device):
    def step():
        raise torch.OutOfMemoryError('CUDA out of memory.\nmore')

    return step


def dying(case, device):
    return partial(os._exit, 9)


def add_failing(*_):
    "Two more candidates: one raises, one ends the process that measures."
    CANDIDATES['full'], CANDIDATES['dies'] = Candidate(without_memory), Candidate(dying)


def test_a_candidate_that_fails_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(timing_room, '_start', add_failing)  # in the processes that measure
    for name in 'full', 'dies':
        monkeypatch.setitem(CANDIDATES, name, CANDIDATES['ours'])
    pairs = [('full', False), ('ours', False), ('dies', False), ('plain loop', False)]
    said, ceilings = [], dict(float32=100.0)
    rows = _measure(Case('small', **SMALL), pairs, 2, False, 'cpu', ceilings, said.append)
    found = {row['candidate']: row for row in rows}
    assert found['full']['failed'] == 'OutOfMemoryError: CUDA out of memory.'
    assert 'ended: out of memory?' in found['dies']['failed']
    assert found['ours']['n'] == found['plain loop']['n'] == 2
    assert sum('failed: ' in line for line in said) == 2
    result = dict(device='cpu', rows=rows, curves={}, ceilings=ceilings, cases=[])
    result['episodes_seconds'] = 0.0
    assert 'not measured' in show_targets(result)
    plot_bench(result)


def small_bench(monkeypatch, **cases):
    "Leave the bench these cases alone, and nothing to measure beside them."
    for name in 'CASES', 'ADAPTATION', 'LONG':
        monkeypatch.setattr(bench_room, name, cases.get(name, []))
    for name, value in dict(conv_ceiling=100.0, _start_up={}).items():
        monkeypatch.setattr(bench_room, name, lambda *_, value=value: value)


def test_some_candidates_and_each_case_kept(monkeypatch):
    small_bench(monkeypatch, CASES=[Case(f'case {i}', **SMALL) for i in range(2)])
    kept = []

    def look(result):
        kept.append([row['case'] for row in result['rows']])

    how = dict(rounds=1, memory=False, curves=False, say=len, after_each=look)
    result = bench(only=('ours*', 'plain*'), without=('ours, *', '*graph'), **how)
    assert {row['candidate'] for row in result['rows']} == {'ours', 'plain loop'}
    assert kept == [['case 0'] * 4, ['case 0'] * 4 + ['case 1'] * 4]


def test_a_case_that_no_candidate_runs_is_left_out(monkeypatch):
    adaptation = Case('at test time', **SMALL, adapt=True)
    small_bench(monkeypatch, CASES=[Case('small', **SMALL)], ADAPTATION=[adaptation])
    how = dict(rounds=1, memory=False, curves=False, say=len, only=('ours, threads',))
    result = bench(**how)
    assert [case['name'] for case in result['cases']] == ['small']
    assert {row['case'] for row in result['rows']} == {'small'}
    with pytest.raises(ValueError, match="no case of 'at test time' is timed for ours, thr"):
        bench('at test time', **how)
