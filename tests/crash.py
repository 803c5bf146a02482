"""Kill a small piece of work again and again with SIGKILL, and look at what is left.

`crash.py FOLDER JOBS SEED` prints what it saw. The work builds a bank, trains with a checkpoint at
each iteration, and writes a result. Each job is killed once while building, once while training,
once while writing a checkpoint and once while writing the result, at a random moment of it, and
continued each time.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import fewshotmeta.training.fit as training
from fewshotmeta.data.banks import ImageBank, cached
from fewshotmeta.data.episodes import EpisodeSampler
from fewshotmeta.data.files import read_json, write_json
from fewshotmeta.learners.backbones import conv4
from fewshotmeta.learners.maml import MAML
from fewshotmeta.training.checkpoints import read_checkpoint

PHASES = dict(b='building a bank', t='training', c='writing a checkpoint', r='writing a result')


def build():
    "A bank of noise: 40 classes of 100 images."
    pixels = np.random.default_rng(0).integers(0, 256, (4000, 1, 16, 16), np.uint8)
    names = [f'class{i}' for i in range(40)]
    return ImageBank(torch.from_numpy(pixels), range(0, 4000, 100), [100] * 40, names, name='noise')


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
    learner = MAML(conv4(size=16, filters=4), 5, inner_lr=0.1, seed=0)
    tasks = EpisodeSampler(bank, 5, 1, 2, seed=0)
    often = dict(save_every=1, log_every=3, progress=False)
    run = training.fit(learner, tasks, 12, meta_batch=2, checkpoint=folder / 'run', **often)
    head, _ = read_checkpoint(folder / 'run')
    losses = [r['loss'] for r in run.history]
    say('r')
    write_json(
        folder / 'run' / 'result.json',
        dict(tensors=head['tensors'], losses=losses, notes=['x' * 80] * 5000),
    )
    say('e')


def forked(folder, unread, pipe):
    "Do the work in a child that says its letters to a pipe; give its process id."
    pid = os.fork()
    if pid:
        return pid
    os.close(unread)
    try:
        work(folder, lambda text: os.write(pipe, text.encode()))
        os._exit(0)
    except BaseException as e:
        os.write(pipe, f'!{type(e).__name__}: {e}'.encode())
        os._exit(1)


def attempt(folder, phase, wait, count):
    """Fork the work; kill it `wait` seconds into the `count`-th time it enters a phase.

    What it said, whether it was killed, and when it had said how much.
    """
    r, w = os.pipe()
    pid = forked(folder, r, w)
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
    begun = []
    for i, letter in enumerate(said):
        if letter in 'btcre':
            begun.append((letter, next(t for t, n in times if n > i)))
    spans = {phase: [] for phase in PHASES}
    for (phase, start), (_, end) in zip(begun, begun[1:]):
        spans[phase].append(end - start)
    return {phase: sorted(s)[len(s) // 2] for phase, s in spans.items()}


def left_whole(folder, saved):
    "What is there under its own name is whole, and nothing that was reported as saved is lost."
    run = folder / 'run'
    if (run / 'checkpoint.safetensors').exists():
        assert read_checkpoint(run)[0]['iteration'] >= saved, 'a saved iteration is lost'
    else:
        assert not saved, 'the checkpoint is lost'
    if (run / 'result.json').exists():
        read_json(run / 'result.json')


def iteration(folder):
    "Of the checkpoint; -1 where there is none yet, since the first one is of iteration 0."
    there = (folder / 'run' / 'checkpoint.safetensors').exists()
    return read_checkpoint(folder / 'run')[0]['iteration'] if there else -1


class Crashes:
    "What was seen in all jobs."

    def __init__(self, folder, seed):
        self.folder = Path(folder)
        self.rng = random.Random(seed)
        self.long = durations(self.folder / 'undisturbed')
        self.want = read_json(self.folder / 'undisturbed' / 'run' / 'result.json')
        self.killed = Counter()
        self.resumed = 0
        self.identical = 0

    def blow(self, place, phase):
        "Let a job run until a random moment of a phase; what it said, and whether it was killed."
        wait = self.rng.uniform(0, 0.7 * self.long[phase])
        count = self.rng.randint(1, 3) if phase in 'tc' else 1
        said, dead, _ = attempt(place, phase, wait, count)
        assert '!' not in said, said
        return said, dead

    def job(self, place):
        "Kill one job in each phase, continue it each time, and compare what comes out."
        saved, saved_then, done_in, struck = 0, -1, '', False
        for phase in 'btcrrr':  # a job that is through writes its result again
            if phase == 'r' and done_in == 'r':
                continue
            said, dead = self.blow(place, phase)
            self.resumed += struck and continues(said, saved_then)
            struck = dead
            if not dead:
                continue  # it was through before the blow fell
            done_in = next((c for c in reversed(said) if c in PHASES), '')
            self.killed[PHASES.get(done_in, 'starting')] += 1
            saved = max([saved, *map(int, re.findall(r's(\d+);', said))])
            left_whole(place, saved)
            saved_then = iteration(place)
        said, dead, _ = attempt(place, None, 0, 0)
        assert said.endswith('e'), said
        self.resumed += struck and continues(said, saved_then)
        self.identical += read_json(place / 'run' / 'result.json') == self.want
        shutil.rmtree(place)


def continues(said, saved):
    "Whether an attempt went on where the last whole checkpoint was."
    first = re.search(r's(\d+);', said)
    return first is None or int(first[1]) == saved + 1


def main(folder, jobs, seed):
    "Run the jobs and print what was seen, as JSON."
    crashes = Crashes(folder, seed)
    for number in range(jobs):
        crashes.job(crashes.folder / f'job{number}')
    seen = dict(
        kills=sum(crashes.killed.values()),
        where=dict(crashes.killed),
        resumed=crashes.resumed,
        jobs=jobs,
        identical=crashes.identical,
    )
    print(json.dumps(seen))


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
