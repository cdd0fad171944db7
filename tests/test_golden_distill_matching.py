"""Distribution matching and RTDMD's gradient against the papers' official code (golden vectors, float64)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_data import FLOW, cases, close, f64
from torch import Tensor, nn

from diffalign.algorithms import _scores
from diffalign.algorithms._ambient import (
    LARGEST,
    consistency,
    denoising_loss,
    levels,
    matching_gradient,
    matching_loss,
    pulled,
    renoised,
)
from diffalign.algorithms._scores import Scores
from diffalign.algorithms._steps import stored_step
from diffalign.algorithms.rtdmd import RTDMD, Backpropagated, sub_steps
from diffalign.balancing import Meter, Work, back_propagate
from diffalign.rollout import generators, prompt_seed
from diffalign.samplers import denoise, randn
from diffalign.schedules import VP, RectifiedFlow, Schedule
from diffalign.types import Conditioning, Rollout

CLEAN = -1.0  # the level of a VP model at which there is no noise at all
CFG = 4.5  # of the teacher in hybrid_policy_gradient.json, as in the paper's configuration; the file does not say
SINGLE = 2e-5  # ac_backward_sim.json was computed in fp32


@dataclass(frozen=True)
class Toy:
    """The golden files' network p0 x + p1 sin(x + c) + p2 t / 1000, guided as u + g (c - u)."""

    p: Tensor  # [3]
    c: Tensor  # [B]
    unconditional: Tensor | None = None  # scalar or [B]
    guidance: float = 1.0
    schedule: Schedule = FLOW

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        out = self.output(x, s, self.c)
        if self.unconditional is not None and self.guidance != 1:
            bare = self.output(x, s, self.unconditional.expand(len(x)))
            out = bare + self.guidance * (out - bare)
        return self.schedule.to_x0_eps(out, x, s)

    def output(self, x: Tensor, s: Tensor | float, c: Tensor) -> Tensor:
        time = torch.as_tensor(s, dtype=x.dtype).expand(len(x))
        of_text, of_time = (values.reshape(-1, *[1] * (x.ndim - 1)) for values in (c, time))
        return self.p[0] * x + self.p[1] * torch.sin(x + of_text) + self.p[2] * of_time


@pytest.mark.parametrize("case", cases("distill", "ac_forward_target"))
def test_what_a_noisy_sample_becomes_and_its_velocity(case: dict[str, Any]) -> None:
    at = renoised(FLOW, *(f64(case[k]) for k in ("x_s", "s", "t", "noise")))
    close(at.x, case["x_t"], 1e-11)
    close(at.target, case["v_target_scaled"], 1e-11)
    close(at.target / at.std, case["v_target"], 1e-11, 1e-11)
    close(at.std.flatten(), case["scale"], 1e-11)
    close((1 / at.std.flatten().square()).clamp(max=LARGEST), case["inv_scale_weight"], 1e-11)


@pytest.mark.parametrize("case", cases("distill", "ac_fake_update"))
def test_the_fake_score_s_losses(case: dict[str, Any]) -> None:
    p = f64(case["p"]).requires_grad_()
    denoiser, moves = Toy(p, f64(case["c"])), case["num_steps"]
    at = renoised(FLOW, *(f64(case[k]) for k in ("x_s", "s", "t", "noise")))
    x0, eps = denoiser.predict(at.x, at.t)
    denoising = denoising_loss(FLOW, x0, eps, at, case["move_scale_out"]).mean()
    close(denoising, case["loss_ac"])

    back, paths = list(f64(case["step_deltas"])), 2 if case["two_sample"] else 1
    assert len(back) == moves
    given = f64(case["path_noises"]) if case["path_noises"] else torch.zeros(paths * moves, *at.x.shape).double()
    assert len(given) == paths * moves
    noises = [list(part) for part in given.split(moves)]
    regulariser = consistency(denoiser, at, x0, eps, back, noises, case["eta"], not case["stopgrad"]).mean()
    close(regulariser, case["loss_cons"])
    loss = denoising + case["cons_weight"] * regulariser
    close(loss, case["loss"])
    close(torch.autograd.grad(loss, p)[0], case["grad_p"])


@pytest.mark.parametrize("case", cases("distill", "dmd_loss"))
def test_the_matching_gradient(case: dict[str, Any]) -> None:
    x = f64(case["x"]).requires_grad_()
    gradient = matching_gradient(x, f64(case["fake"]), f64(case["real"]), case["normalize"])
    close(gradient.norm(), case["gradient_norm"], 1e-12, 1e-12)
    loss = pulled(x, gradient).mean()
    close(loss, case["loss"], 1e-12)
    close(torch.autograd.grad(loss, x)[0], case["grad_x"], 1e-12)


@pytest.mark.parametrize("case", cases("distill", "ac_generator_update"))
def test_the_generator_s_loss(case: dict[str, Any]) -> None:
    x, s, t, noise = (f64(case[k]) for k in ("x_s", "s", "t", "noise"))
    c, unconditional, eta = f64(case["c"]), f64(case["c_uncond"]), case["eta"]
    at = renoised(FLOW, x, s, t, noise)
    fake = Toy(f64(case["p_fake"]), c).predict(at.x, at.t)
    teacher = Toy(f64(case["p_teacher"]), c, unconditional, case["cfg"]).predict(at.x, at.t)
    drawn = torch.zeros_like(x) if case["transition_noise"] is None else f64(case["transition_noise"])
    x.requires_grad_()
    loss = matching_loss(FLOW, x, at, fake, teacher, drawn, eta, case["normalize"]).mean()
    close(loss, case["loss"])
    close(torch.autograd.grad(loss, x)[0], case["grad_x_s"])


@pytest.mark.parametrize("case", cases("distill", "ac_backward_sim"))
def test_sampling_up_to_a_step_and_noising_on(case: dict[str, Any]) -> None:
    log = [(kind, f64(values)) for kind, values in case["rng_log"]]
    assert log[0][0] == "randint" and log[0][1].tolist() == [case["stop_steps"]]
    *normal, (uniform, u), (last, forward) = log[1:]
    assert (uniform, last) == ("rand", "randn_like") and all(kind == "randn" for kind, _ in normal)
    x, *noises = (values for _, values in normal)

    sigmas = f64([*case["sigmas"], 0.0])
    walk, taken = denoise(Toy(f64(case["p"]), f64(case["c"])), x, sigmas, "cps", case["eta"]), None
    for i in range(case["stop_steps"]):
        taken = next(walk) if taken is None else walk.send(x)
        x = taken.mean + (taken.std * noises.pop(0) if sigmas[i + 1] > 0 else 0)
    assert taken is not None and not noises
    s = sigmas[case["stop_steps"]].expand(len(x))
    close(s, case["sigma_start"], SINGLE)
    close(x, case["x_s"], SINGLE)
    close(taken.x0, case["x0_gen"], SINGLE)
    t = levels(u, s)
    close(1000 * t, case["renoise_timestep"], 1e-3)
    close(t, case["sigma_end"], SINGLE)
    at = renoised(FLOW, x, s, t, forward)
    close(at.x, case["x_t"], SINGLE)
    close(at.target, case["v_target_scaled"], SINGLE)
    close(at.std.flatten(), case["scale"], SINGLE)


@pytest.mark.parametrize("case", cases("distill", "dmd2_eps_baseline"))
def test_dmd2_of_a_model_that_predicts_noise(case: dict[str, Any]) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # in fp32 it is diffusers' own
    schedule, x = VP((1 - betas).cumprod(0)), f64(case["x"])
    c, unconditional = f64(case["c"]), f64(case["c_uncond"])
    p_fake = f64(case["p_fake"]).requires_grad_()
    fake = Toy(p_fake, c, schedule=schedule)
    teacher = Toy(f64(case["p_real"]), c, unconditional, case["real_cfg"], schedule)

    moved = x.clone().requires_grad_()
    at = renoised(schedule, x, CLEAN, f64(case["t_dm"]) / 1000, f64(case["noise_dm"]))
    with torch.no_grad():
        predictions = [d.predict(at.x, at.t) for d in (fake, teacher)]
    loss = matching_loss(schedule, moved, at, predictions[0], predictions[1], torch.zeros_like(x), 1.0).mean()
    close(loss, case["loss_dm"])
    close(torch.autograd.grad(loss, moved)[0], case["grad_x"])

    t, noise = f64(case["t_fake"]), f64(case["noise_fake"])
    if t.ndim > 1:  # a file may have the two names exchanged
        t, noise = noise, t
    at = renoised(schedule, x, CLEAN, t / 1000, noise)
    loss = denoising_loss(schedule, *fake.predict(at.x, at.t), at).mean()
    close(loss, case["loss_fake"])
    close(torch.autograd.grad(loss, p_fake)[0], case["grad_p_fake"])


@pytest.mark.parametrize("case", cases("distill", "subgrpo_selection"))
def test_which_steps_an_epoch_trains(case: dict[str, Any]) -> None:
    first, last, seed, epoch = case["range_start"], case["range_end"], case["train_seed"], case["epoch"]
    stochastic, count = last - first + 1, case["num_train_steps"]
    chosen = sub_steps(seed, case["epoch_seed"], stochastic, count)
    assert [first + i for i in chosen] == case["selected"]
    if case["epoch_seed"] == 100_000 * epoch:
        assert RTDMD(name="rtdmd", subset=count).chosen(stochastic + 1, seed, epoch) == chosen


@pytest.mark.parametrize("case", cases("distill", "subgrpo_shared_noise"))
def test_noise_that_the_images_of_a_prompt_share(case: dict[str, Any]) -> None:
    assert (case["noise"] is None) == (case["step"] in case["selected"])
    if case["noise"] is not None:
        seeds = [prompt_seed(prompt, case["step"], case["epoch_seed"]) for prompt in case["prompts"]]
        expected = torch.tensor(case["noise"])
        assert torch.equal(randn(expected.shape, generators(seeds), "cpu"), expected)


class Policy:
    """The generator of the golden file, with its teacher, its decoder and its reward."""

    kernel = "cps"

    def __init__(self, case: Mapping[str, Any]) -> None:
        self.eta, self.teacher = case["eta"], f64(case["p_teacher"])
        self.unconditional = f64(case["c_uncond"])
        self.parameters = {"p": nn.Parameter(f64(case["p_gen"]))}
        self.p: Tensor = self.parameters["p"]

    def denoiser(self, cond: Conditioning, guided: bool = True) -> Toy:
        return Toy(self.p, cond.rows()["c"])

    def guided(self, cond: Conditioning, guidance: float) -> Toy:
        return Toy(self.p, cond.rows()["c"], self.unconditional, guidance)

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.p = self.teacher
        yield
        self.p = self.parameters["p"]

    def decode(self, latents: Tensor) -> Tensor:
        return latents.sigmoid()

    def score(self, reward: str, images: Tensor, batch: Rollout, prompts: Sequence[str] | None = None) -> Tensor:
        flat = images.flatten(1)
        return 4 * flat.mean(1) + flat.square().mean(1)


class Replayed:
    """The golden file's random numbers, in the order in which each sub-batch took them."""

    batches: list[list[tuple[str, Tensor]]]

    def __init__(self, seeds: Tensor, turn: int, purpose: int) -> None:
        self.left = self.batches.pop(0)
        kind, _ = self.left.pop(0)  # noise of the last step, which is deterministic
        assert kind == "randn_like" and purpose == _scores.GENERATOR

    def uniform(self, like: Tensor) -> Tensor:
        return self.next("rand_like")

    def normal(self, like: Tensor) -> Tensor:
        return self.next("randn_like")

    def next(self, expected: str) -> Tensor:
        kind, values = self.left.pop(0)
        assert kind == expected
        return values


@pytest.mark.parametrize("case", cases("distill", "hybrid_policy_gradient"))
def test_the_gradient_of_an_epoch_of_rtdmd(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trained, (last,) = case["ppo_steps"], case["aux_steps"]
    kept, sigmas, batches = [*trained, last], f64(case["sigmas"]), case["num_sub_batches"]
    assert last == len(sigmas) - 2 and sigmas[-1] == 0
    assert case["grad_divisor"] == batches * len(kept) and case["n_opt_steps"] == 1

    method = RTDMD(
        name="rtdmd",
        clip=case["clip"],
        subset=len(trained),
        matching=case["ac_weight"],
        backpropagated=Backpropagated(weight=case["bp_scale"], rewards=("toy",), margin=case["bp_margin"]),
        guidance=CFG,
    )
    policy, (shuffled, *log) = Policy(case), case["rng_log"]
    memory = method.start(SimpleNamespace(schedule=RectifiedFlow()), policy.parameters)
    assert isinstance(memory, Scores) == (case["ac_weight"] > 0) and shuffled[0] == "randperm"
    if isinstance(memory, Scores):
        memory.fake["p"].data = f64(case["p_fake"])
        memory.guidance = method.guidance  # type: ignore[assignment]  # as an epoch sets it

    latents, following = f64(case["latents"]), f64(case["next_latents"])
    advantages = f64(case["advantages"]).clamp(-case["adv_clip"], case["adv_clip"])
    count = len(latents)
    rollout = Rollout(
        prompts=["a"] * count,
        metadata=[{}] * count,
        group=torch.zeros(count, dtype=torch.long),
        seeds=torch.arange(count),
        cond=Conditioning({"c": f64(case["c"])}, torch.arange(count)),
        sigmas=sigmas,
        kept=torch.tensor(kept),
        x0=following[:, -1],
        states=torch.stack([latents, following], 2)[:, kept],
        advantages=advantages[:, 0],
    )
    for column in advantages.unbind(1):  # one advantage for all steps of an image
        close(column, advantages[:, 0].tolist())

    policy.p = f64(case["p_old"])  # which the samples come from
    steps = range(len(sigmas) - 1)
    whole = replace(rollout, states=torch.stack([latents, following], 2), kept=torch.tensor(steps))
    taken = [stored_step(policy.denoiser(whole.cond), policy, whole, k) for k in steps]
    close(torch.stack([step.log_prob for step in taken], 1), case["old_logp"])
    rollout.old = method.behaviour(policy, rollout)
    policy.p = policy.parameters["p"]

    drawn = [(kind, f64(values)) for kind, values in log]
    each = len(drawn) // batches
    assert each * batches == len(drawn)
    logs = [drawn[i : i + each] for i in range(0, len(drawn), each)]
    Replayed.batches = list(logs)
    monkeypatch.setattr(_scores, "Draws", Replayed)
    order = torch.tensor(shuffled[1]).split(count // batches)
    work = [Work(rollout[rows], method.losses(policy, rollout[rows], memory)) for rows in order]
    if isinstance(memory, Scores):
        assert torch.equal(memory.fake["p"], f64(case["p_fake"]))
    back_propagate(None, work, {}, count, Meter())
    close(policy.parameters["p"].grad, case["grad_p_gen"], 1e-8)
    assert not any(logs) or not method.matching  # every number of the log was used
