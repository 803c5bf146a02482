"""The bench: candidates that compute the same, counts that are right, output that is whole. No test looks at a clock."""

import json, sys
import pytest, torch
from torch.utils.flop_counter import FlopCounterMode
from fewshotmeta.all import *
from fewshotmeta.lab.command import main
from fewshotmeta.training.timing import (
    ON_GPU,
    PAIRS,
    _against_peers,
    _peak,
    _plainly,
    _spread,
    _target,
    plain_net,
)
from fewshotmeta.lab.reports import _line

SMALL = dict(tasks=2, size=16, filters=8, n_query=2)


def exact(case, plain, like=None):
    m = to_dtype(
        case.learner(from_module(plain_net(case), case.channels, case.size) if plain else None),
        torch.float64,
    )
    if like:
        with torch.no_grad():
            for a, b in zip(m.theta.values(), like.theta.values(), strict=True):
                a.copy_(b)
    ep = Episodes(*(t.double() if t.is_floating_point() else t for t in case.episodes()))
    return m, ep


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
    ours, ep = exact(case, False)
    plain, _ = exact(case, True, ours)
    a, b = meta_gradient(ours, ep), meta_gradient(plain, ep, plan=Plan('p', 1))
    for x, y in zip([a.loss, *a.grads], [b.loss, *b.grads], strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-10)


def test_the_plain_loop_of_mamlpp_computes_the_same(monkeypatch):
    "With the same ingredients, and the graph of each query pass kept."
    case = Case('', 'mamlpp', steps=3, **SMALL)
    _, ep = exact(case, False)
    ours, plain = (
        to_dtype(mamlpp(net, 5, 3, ingredients=('msl', 'lslr')), torch.float64)
        for net in (conv4(1, 16, filters=8), from_module(plain_net(case), 1, 16))
    )
    with torch.no_grad():
        for a, b in zip(plain.theta.values(), ours.theta.values(), strict=True):
            a.copy_(b)
    _plainly(plain)
    a = meta_gradient(ours, ep, 0.02)

    def never(*args):
        raise AssertionError('differentiated at once')

    monkeypatch.setattr('fewshotmeta.learners.maml.at_once', never)
    with pytest.raises(AssertionError, match='at once'):
        meta_gradient(ours, ep, 0.02, Plan('p', 1))
    b = meta_gradient(plain, ep, 0.02, Plan('p', 1))
    for x, y in zip([a.loss, *a.grads], [b.loss, *b.grads], strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-10)


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
    "Query and first-order support passes exactly; PyTorch's own second derivative computes more than it need."
    case = Case(
        **{
            **case.__dict__,
            'tasks': 1,
            'method': case.method if case.method == 'hypermaml' else 'first_order',
        }
    )
    with FlopCounterMode(display=False) as counter:
        meta_gradient(case.learner(), case.episodes(), plan=plan_for('cpu', 'plain'))
    counted = (
        sum(v for k, v in counter.get_flop_counts()['Global'].items() if 'convolution' in str(k))
        / 1e9
    )
    assert counted == pytest.approx(case.work(), rel=1e-6)


def test_second_order_work_by_hand():
    "A support pass differentiated twice: three maps, and the two derivatives of each of two of them, and the outer two."
    first, second = (Case('', m, tasks=1, filters=64).work() for m in ('first_order', 'maml'))
    rest, one = sum(2 * 9 * s * s * 64 * 64 for s in (14, 7, 3)) / 1e9, 2 * 9 * 28 * 28 * 64 / 1e9
    assert second - first == pytest.approx(5 * (6 * rest + 2 * one))


@pytest.mark.parametrize('name', CANDIDATES)
def test_every_candidate_runs_what_it_claims(name):
    for case in (
        Case('', **SMALL),
        Case('', 'mamlpp', steps=2, **SMALL),
        Case('', 'hypermaml', **SMALL),
        Case('', steps=2, adapt=True, **SMALL),
    ):
        if can_run(name, case):
            CANDIDATES[name](case, 'cpu')()
    assert can_run(name, Case('')) or name in (
        'learn2learn',
        'higher',
        'ours, im2col',
        'ours, inductor',
        'ours, tf32',
    )


def test_each_device_has_its_candidates():
    "A CPU's worker threads are not timed on a GPU, nor a GPU's precision on a CPU; between them every candidate has its turn."
    gpu, cpu = (
        {n for n, _ in pairs if n not in ('learn2learn', 'higher') and can_run(n, Case(''), device)}
        for pairs, device in ((ON_GPU, 'cuda'), (PAIRS, 'cpu'))
    )
    assert (
        'ours, tf32' in gpu - cpu
        and 'ours, together' in cpu - gpu
        and {'ours', 'plain loop', 'ours, bf16'} <= gpu & cpu
    )
    assert gpu | cpu == set(CANDIDATES) - {'learn2learn', 'higher'}


def test_targets_of_a_gpu():
    def row(case, candidate, ms, share=0.1):
        return dict(
            case=case, candidate=candidate, kept_memory=False, ms=ms, share=share, peak_bytes=None
        )

    rows = [
        row('16 tasks, 1 step', 'learn2learn', 50.0),
        row('16 tasks, 1 step', 'ours', 2.0),
        row('16 tasks, 5 steps', 'learn2learn', 50.0),
        row('16 tasks, 5 steps', 'ours', 5.0),
        row('16 tasks, 5 steps', 'ours, tf32', 4.0, 0.35),
    ]
    assert [(t['value'], t['met']) for t in targets(dict(device='cuda', rows=rows, curves={}))] == [
        (25.0, True),
        (10.0, False),
        (None, None),
        (None, None),
        (0.35, True),
    ]


def test_what_was_not_measured_says_so():
    result = dict(device='cpu', rows=[], curves={})
    assert (
        {(t['value'], t['met']) for t in targets(result)} == {(None, None)}
        and 'not measured |' in show_targets(result)
        and 'met |' not in show_targets(result)
    )


def test_line_and_spread():
    assert _line([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx(
        dict(slope=2.0, intercept=3.0, r2=1.0)
    )
    assert _line([1, 2, 3], [1.0, 3.0, 1.0])['r2'] < 0.5
    assert (
        _spread([0.001, 0.003, 0.002]) == pytest.approx(dict(ms=2.0, q1=1.0, q3=3.0, n=3))
        and _spread([0.5])['ms'] == 500
    )


def test_targets_compare_with_the_fastest_peer_as_it_comes():
    def row(candidate, keep, ms, mb):
        return dict(
            case='16 tasks, 1 step',
            candidate=candidate,
            kept_memory=keep,
            ms=ms,
            share=0.5,
            peak_bytes=mb,
        )

    rows, out = (
        [
            row('ours', False, 40.0, 10),
            row('plain loop', False, 200.0, 40),
            row('higher', False, 160.0, 80),
            row('plain loop', True, 50.0, None),
        ],
        [],
    )
    _against_peers(dict(rows=rows), '16 tasks, 1 step', out)
    assert [(t['value'], t['met']) for t in out] == [
        (0.25, True),
        (0.125, True),
        (0.5, False),
    ] and 'higher' in out[0]['against']
    assert _target('x', 2, 1.0)['met'] and not _target('x', 2, 1.0, most=False)['met']


def test_bench_writes_a_whole_result(tmp_path, capsys):
    assert main(['bench', '--quick', '--out', str(tmp_path / 'speed')]) == 0
    result = json.loads((tmp_path / 'speed' / 'bench.json').read_text())
    assert (
        {'ours', 'ours, recomputed'} == {r['candidate'] for r in result['rows']}
        and result['ceiling'] > 1
        and result['provenance']['versions']['torch']
    )
    assert (tmp_path / 'speed' / 'bench.png').read_bytes().startswith(b'\x89PNG') and sorted(
        p.name for p in (tmp_path / 'speed').iterdir()
    ) == ['bench.json', 'bench.png']
    assert 'tasks/s' in capsys.readouterr().out


@pytest.mark.parametrize(
    'argv,message',
    [(['--cases', 'MAMLpp'], 'no case matches.*16 tasks, 1 step'), (['--rounds', '0'], 'rounds=0')],
)
def test_bad_input(argv, message, capsys, tmp_path):
    import re

    assert (
        main(['bench', '--out', str(tmp_path), *argv]) == 2
        and re.search(message, capsys.readouterr().err)
        and not list(tmp_path.iterdir())
    )


def test_cuda_is_asked_for_in_vain(capsys):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    assert main(['bench', '--device', 'cuda']) == 2 and 'no GPU' in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc')
def test_memory_is_that_of_the_candidate():
    "One graph over all tasks keeps more than a graph a task, in processes of their own."
    case = Case('', tasks=6, filters=16)
    lean, fat = (peak_memory(n, case) for n in ('plain loop', 'plain loop, one graph'))
    assert fat > lean + 20 * 2**20


def test_a_part_of_the_bench_has_its_picture(tmp_path):
    row = dict(
        case='adaptation, 1 step',
        candidate='ours',
        kept_memory=False,
        ms=2.0,
        q1=1.0,
        q3=3.0,
        n=3,
        work=1.0,
        share=0.5,
        peak_bytes=None,
    )
    save_bench(dict(rows=[row], curves={}, ceiling=200.0, cases=[]), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bench.json', 'bench.png']
