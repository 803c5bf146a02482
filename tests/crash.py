"""Kills a small piece of work again and again with SIGKILL, and looks at what is left: `crash.py FOLDER JOBS SEED` prints what it saw.
The work builds a bank, trains with a checkpoint an iteration, and writes a result. Each job is killed once while building, once while
training, once while writing a checkpoint and once while writing the result, at a random moment of it, and continued each time."""

import json, os, random, re, shutil, signal, sys, time
from collections import Counter
from pathlib import Path
import numpy as np, torch
import fewshotmeta.training.fit as training
from fewshotmeta.data.banks import ImageBank, cached
from fewshotmeta.data.episodes import EpisodeSampler
from fewshotmeta.data.files import read_json, write_json
from fewshotmeta.learners.backbones import conv4
from fewshotmeta.learners.maml import MAML
from fewshotmeta.training.fit import fit
from fewshotmeta.training.checkpoints import read_checkpoint

PHASES = dict(b='building a bank', t='training', c='writing a checkpoint', r='writing a result')


def build():
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (4000, 1, 16, 16), np.uint8)
    )
    return ImageBank(
        images, range(0, 4000, 100), [100] * 40, [f'class{i}' for i in range(40)], name='noise'
    )


def work(folder, say):
    "The work; `say` a letter when a phase begins."
    os.environ['FEWSHOTMETA_CACHE'] = str(folder / 'cache')
    save = training.save_checkpoint

    def told(run, *args):
        say('c')
        save(run, *args)
        say(f's{run.iteration};t')

    training.save_checkpoint = told
    say('b')
    bank = cached(dict(set='noise', seed=0), build)
    say('t')
    run = fit(
        MAML(conv4(size=16, filters=4), 5, inner_lr=0.1, seed=0),
        EpisodeSampler(bank, 5, 1, 2, seed=0),
        12,
        meta_batch=2,
        checkpoint=folder / 'run',
        save_every=1,
        log_every=3,
        progress=False,
    )
    head, _ = read_checkpoint(folder / 'run')
    say('r')
    write_json(
        folder / 'run' / 'result.json',
        dict(
            tensors=head['tensors'],
            losses=[r['loss'] for r in run.history],
            notes=['x' * 80] * 5000,
        ),
    )
    say('e')


def attempt(folder, phase, wait, count):
    "Fork the work; kill it `wait` seconds into the `count`-th time it enters a phase. What it said, and whether it was killed."
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(r)
        try:
            work(folder, lambda text: os.write(w, text.encode()))
            os._exit(0)
        except BaseException as e:
            os.write(w, f'!{type(e).__name__}: {e}'.encode())
            os._exit(1)
    os.close(w)
    said, times = '', []
    while chunk := os.read(r, 65536):
        said += chunk.decode()
        times.append((time.perf_counter(), len(said)))
        if phase and said.count(phase) >= count:
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
            phase = None
    os.close(r)
    return said, os.WIFSIGNALED(os.waitpid(pid, 0)[1]), times


def durations(folder):
    "Median seconds of each phase, undisturbed."
    said, _, times = attempt(folder, None, 0, 0)
    assert said.endswith('e'), said
    begun = [(c, next(t for t, n in times if n > i)) for i, c in enumerate(said) if c in 'btcre']
    spans = {c: [end - t for (p, t), (_, end) in zip(begun, begun[1:]) if p == c] for c in PHASES}
    return {c: sorted(s)[len(s) // 2] for c, s in spans.items()}


def left_whole(folder, saved):
    "Everything that is there under its own name is whole, and nothing that was reported as saved is lost."
    run = folder / 'run'
    if (run / 'checkpoint.safetensors').exists():
        assert read_checkpoint(run)[0]['iteration'] >= saved, 'a saved iteration is lost'
    else:
        assert not saved, 'the checkpoint is lost'
    if (run / 'result.json').exists():
        read_json(run / 'result.json')


def iteration(folder):
    return (
        read_checkpoint(folder / 'run')[0]['iteration']
        if (folder / 'run' / 'checkpoint.safetensors').exists()
        else -1
    )  # the first checkpoint is of iteration 0


def main(folder, jobs, seed):
    rng, folder = random.Random(seed), Path(folder)
    long = durations(folder / 'undisturbed')
    want = read_json(folder / 'undisturbed' / 'run' / 'result.json')
    killed, resumed, identical = Counter(), 0, 0

    def continues(said, saved):
        "Whether an attempt went on where the last whole checkpoint was."
        first = re.search(r's(\d+);', said)
        return first is None or int(first[1]) == saved + 1

    for job in range(jobs):
        place, saved, saved_then, done_in, blows = folder / f'job{job}', 0, -1, '', 0
        for phase in 'btcrrr':  # a job that is through writes its result again
            if phase == 'r' and done_in == 'r':
                continue
            said, dead, _ = attempt(
                place,
                phase,
                rng.uniform(0, 0.7 * long[phase]),
                rng.randint(1, 3) if phase in 'tc' else 1,
            )
            assert '!' not in said, said
            resumed += blows and continues(said, saved_then)
            blows = 0
            if not dead:
                continue  # it was through before the blow fell
            last = [c for c in said if c in PHASES]
            done_in = last[-1] if last else ''
            killed[PHASES[done_in] if last else 'starting'] += 1
            saved = max([saved, *map(int, re.findall(r's(\d+);', said))])
            left_whole(place, saved)
            blows, saved_then = 1, iteration(place)
        said, dead, _ = attempt(place, None, 0, 0)
        assert said.endswith('e'), said
        resumed += blows and continues(said, saved_then)
        identical += read_json(place / 'run' / 'result.json') == want
        shutil.rmtree(place)
    print(
        json.dumps(
            dict(
                kills=sum(killed.values()),
                where=dict(killed),
                resumed=resumed,
                jobs=jobs,
                identical=identical,
            )
        )
    )


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
