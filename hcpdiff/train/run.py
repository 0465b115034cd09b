"""The only place that wires a run together: config -> model, data, trainables -> trainer, hooks, loggers."""

import functools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import device as machine
from ..checkpoint.io import write_atomic
from ..checkpoint.resume import find_run, states
from ..config.build import build, check_target
from ..config.load import Loaded
from ..config.schema import RunConfig
from ..data.dataset import build_train_data
from ..data.fingerprint import fingerprint as data_fingerprint
from ..data.plan import Position
from ..diffusion.objective import PREDICTIONS, DiscreteObjective
from ..errors import ConfigError, HCPError, Interrupted
from ..families import detect
from ..families.base import Models, file_mark, fingerprint
from ..families.source import resolve
from ..loggers import LoggerGroup
from ..loss import make_loss
from ..trainables.lora import LoraTrainable
from . import folder, report
from .conditioning import Encoder, FrozenText
from .hooks import LogHook, PreviewHook
from .init import start_from_files
from .optim import Gradients, lr_factor, optimizer_groups, simulated_factor
from .lock import RunLock
from .parallel import Parallel
from .probe import probe
from .resumed import Resumed
from .save import SaveHook, SavePolicy
from .signals import StopRequest
from .state import restore
from .step import DenoisingStep
from .trainer import Trainer


class Run:
    """One training run. Everything that can be wrong is found before the run folder is made; then latents are cached and the steps begin."""

    def __init__(self, loaded: Loaded[RunConfig], parallel: Parallel, allow: Sequence[str] = (), stop: StopRequest | None = None):
        """stop: signals as they come; None: nobody listens to them here."""
        self.loaded, self.cfg, self.parallel, self.allow, self.stop = loaded, loaded.config, parallel, allow, stop or StopRequest()
        self.folder = self.lock = None
        self.device, self.started = parallel.device, time.monotonic()
        self.dtype = machine.compute_dtype(self.cfg.mixed_precision, self.device)
        self.accumulation = self.cfg.train.gradient_accumulation_steps
        self.phase, self.said_before = "loading the model", []
        self.preview_prompts = None
        self.geometry = (8, 4)  # of every usual model; only faults of the data depend on it before the model is found
        self.log = LoggerGroup([])

    def train(self) -> int:
        """Runs from start to end; returns the exit code: 0, or 128 + the number of the signal that stopped it."""
        try:
            self._set_up_machine()
            self._read_inputs()
            self._load_model()
            self._attach_adapters()
            trainer = self._build_trainer()
            self._report(trainer.state.step)
            self._cache()
            with self.stop.patiently():  # from here on there is something to keep: a step is finished and saved
                self._make_folder(trainer.state.step)
                trainer.hooks += self._hooks()
                if self.device.type != "cpu":
                    self.log.say(probe(trainer, self.data.largest_batch(), self.geometry))
                self.phase = "training"
                finished = trainer.fit(self.stop)
            how = "done:" if finished else "stopped:"
            self.log.say(f"{how} step {trainer.state.step} after {time.monotonic() - self.started:.0f} s, peak memory {machine.peak_memory(self.device)}. "
                         f"Everything is in {self.folder}")
            if not finished:
                self.log.say(self._how_to_go_on())
        except torch.OutOfMemoryError as error:
            raise HCPError(f"out of memory while {self.phase}. Other programs on the device, data.<dataset>.batch_size, bucket.target_area and "
                           f"model.gradient_checkpointing decide how much is needed.") from error
        except Interrupted as error:
            error.args = (f"{error.args[0]} while {self.phase}. {self._how_to_go_on()}",)
            raise
        finally:
            self.log.close()
            if self.lock is not None:
                self.lock.release()
        return 0 if finished else self._signal_code()

    def _how_to_go_on(self) -> str:
        if self.folder is None:
            return "No run folder was made; latents in a disk cache are kept."
        saved = states(self.folder)
        if not saved:
            return f"Nothing was saved yet: {self.folder} may be removed."
        return f"Saved up to step {saved[-1]}; to go on: the same command with train.resume={self.folder}"

    def _signal_code(self) -> int:
        """The exit code of the first process that got a signal."""
        return next((code for code in self.parallel.gather(self.stop.signal and self.stop.exit_code) if code), self.stop.exit_code)

    # -- before anything is written: every fault is found here ---------------------------------------------------------------------------------

    def _open_loggers(self) -> None:
        if self.parallel.main:
            self.log = LoggerGroup([build(spec, "logger", f"logger[{i}]", self.allow) for i, spec in enumerate(self.cfg.logger)])
        for file in self.loaded.files:
            self.log.say(f"config: {file}")
        for notice in (*self.loaded.notices, *self.said_before):
            self.log.say(notice if notice.startswith("warning:") else f"note: {notice}")

    def _set_up_machine(self) -> None:
        machine.check_build()
        machine.set_threads(self.cfg.train.cpu_threads, self.parallel.per_machine)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.cfg.allow_tf32

    def _read_inputs(self) -> None:
        """Base model, optimizer and data are looked at before anything large is read; all their faults come in one message."""
        faults: list[str] = []
        for i, spec in enumerate(self.cfg.logger):
            collect(faults, lambda: faults.extend(check_target(spec, "logger", f"logger[{i}]", self.allow)))
        collect(faults, self._find_model)
        collect(faults, lambda: faults.extend(check_target(self.cfg.train.optimizer, "optimizer", "train.optimizer", self.allow)))
        if self.cfg.train.lr_scheduler:
            collect(faults, lambda: faults.extend(check_target(self.cfg.train.lr_scheduler, "lr_scheduler", "train.lr_scheduler", self.allow)))
        collect(faults, self._find_folder)
        collect(faults, self._index_data)
        faults = self.parallel.faults(faults)
        if faults:
            raise ConfigError(faults)
        self._open_loggers()

    def _find_model(self) -> None:
        model = self.cfg.model
        self.base, notices = resolve(model.pretrained_model_name_or_path, model.revision, model.variant)
        self.family = detect(self.base)
        self.family.check(self.base, vae=model.vae)
        self.geometry = self.family.latent_geometry(self.base)
        self.said_before += notices

    def _find_folder(self) -> None:
        self.phase = "looking at its inputs"
        self.resumed, self.automatic = None, "exp_dir" in self.loaded.timed
        if not self.cfg.train.resume:
            folder.check(self.cfg.exp_dir, self.automatic)
        else:
            self.folder, step = find_run(self.cfg.train.resume)
            if self.parallel.main:
                self._hold(RunLock(self.folder))
            self.resumed = Resumed(self.cfg.train.resume, self.folder, step)
            if not self.automatic and Path(self.cfg.exp_dir).resolve() != self.folder.resolve():
                self.said_before.append(f"exp_dir = {self.cfg.exp_dir!r} is not used: the run goes on in {self.folder}")
            self.said_before += self.resumed.notices

    def _hold(self, lock: RunLock) -> None:
        self.lock = lock
        if lock.note:
            self.said_before.append(lock.note)

    def _index_data(self) -> None:
        self.data = build_train_data(self.cfg.data, seed=self.cfg.seed, vae_factor=self.geometry[0], latent_channels=self.geometry[1],
                                     micro_per_step=self.parallel.world * self.accumulation, workers=self.cfg.train.workers)

    def _load_model(self) -> None:
        self.phase = "loading the model"
        model = self.cfg.model
        local = Path(model.pretrained_model_name_or_path).expanduser().exists()
        name = self.base.resolve().name if local else model.pretrained_model_name_or_path  # it goes into files: no local path
        parts = [*(component.name for component in self.family.components), "vae"]
        self.models = self.family.load(self.base, name, parts, self.dtype, model.vae, model.variant)
        if model.noise_scheduler:
            scheduler = build(model.noise_scheduler, "noise_scheduler", "model.noise_scheduler", self.allow)
            if not hasattr(scheduler, "alphas_cumprod"):
                raise ConfigError(f"model.noise_scheduler: {type(scheduler).__name__} is for another kind of model; a DDPM-like scheduler (with alphas_cumprod) is needed.")
            self.models.scheduler_config = dict(scheduler.config)
        if model.prediction_type != "auto":
            self.models.scheduler_config = {**self.models.scheduler_config, "prediction_type": model.prediction_type}
        self.marks = {component.name: file_mark(self.base / component.name) for component in self.family.components} | {"vae": fingerprint(self.models.vae)}
        self.attention = machine.set_attention(self.models.unet, self.cfg.model.attention, "model.attention")

    def _attach_adapters(self) -> None:
        self.trainables, faults = [], []
        for component in self.family.components:
            groups = getattr(self.cfg, component.config_key)
            if groups:
                trainable = LoraTrainable(component, groups, component.config_key)
                collect(faults, lambda: trainable.attach(self.models, self.cfg.seed))
                self.trainables.append(trainable)
        for check in (self._check_clip_skip, self._objective, self._check_previews):
            collect(faults, check)
        if faults:
            raise ConfigError(faults)
        for notice in start_from_files(self.cfg.model, self.trainables):
            self.log.say(notice)
        for trainable in self.trainables:
            for lora in trainable.adapters.values():
                lora.to(self.device)  # the optimizer is made of these, before the frozen weights follow
        if self.cfg.model.gradient_checkpointing:
            for name in dict.fromkeys(["unet", *(trainable.component.name for trainable in self.trainables)]):  # the backward pass always goes through the UNet
                self.family.checkpointing(self.models, name)
                self.models.modules[name].train()  # the libraries recompute in train mode only; SD has no dropout of its own

    def _check_clip_skip(self) -> None:
        layers = self.models.text_encoder.config.num_hidden_layers
        if self.cfg.model.clip_skip >= layers:
            raise ConfigError(f"model.clip_skip = {self.cfg.model.clip_skip}: the text encoder has {layers} layers.")

    def _check_previews(self) -> None:
        if self.cfg.preview.prompts:
            from ..vis.preview import check_preview

            check_preview(self.models, self.cfg.preview)

    # -- the folder and what is made in it --------------------------------------------------------------------------------------------

    def _make_folder(self, step: int) -> None:
        if not self.resumed:
            if self.parallel.main:
                self.folder, held = folder.claim(self.cfg.exp_dir, self.automatic)
                self._hold(held)
            self.folder = Path(self.parallel.share(str(self.folder)))
        elif len(set(self.parallel.gather(step))) > 1:  # no process changes the folder before all have read it
            raise ConfigError(f"train.resume: the processes found different newest states in {self.folder}. Is it on a file system that they share?")
        if self.parallel.main:
            name = "cfg.yaml" if not self.resumed else f"cfg-resumed-{step}.yaml"
            text = self.loaded.yaml
            if str(self.folder) != self.cfg.exp_dir:  # the name was taken and got a suffix
                text = re.sub(r"^exp_dir:.*$", lambda _: f"exp_dir: {json.dumps(str(self.folder))}", text, flags=re.MULTILINE)
            write_atomic(self.folder / name, lambda file: file.write(text.encode("utf-8")))
            for line in self.resumed.tidy() if self.resumed else ():
                self.log.say(line)
        self.log.open(self.folder, step, self.total_steps)
        self.log.say(f"run folder: {self.folder}")

    def _length(self) -> int:
        total = self.cfg.train.train_steps or self.cfg.train.train_epochs * self.data.steps_per_epoch
        if self.resumed and self.resumed.step >= total:
            raise ConfigError(f"train.resume: {self.folder} has done {self.resumed.step} of {total} steps. Raise train.train_epochs or train.train_steps to go on.")
        return total

    def _report(self, step: int) -> None:
        cfg, train = self.cfg, self.cfg.train
        batch = sum(data.batch_size for data in cfg.data.values())
        per_step = batch * self.parallel.world * self.accumulation
        self.log.say(report.facts_table("run", {
            "versions": ", ".join(f"{name} {version}" for name, version in report.versions().items()),
            "device": f"{machine.describe(self.device)}; {self.parallel.world} process{'es' if self.parallel.world > 1 else ''}",
            "precision": f"{machine.SHORT[self.dtype]} (LoRA weights fp32), attention {self.attention}",
            "base model": f"{self.models.name} ({self.family.base_version(self.models)}, predicts {self._prediction()})", "seed": cfg.seed,
            "images per step": f"{per_step} (batch {batch}, processes {self.parallel.world}, accumulation {self.accumulation})",
            "length": f"{self.total_steps} steps, {self.data.steps_per_epoch} an epoch" + (f"; {self.folder} resumed after step {step}" if step else ""),
            "optimizer": f"{train.optimizer['_target_']}, {train.lr_scheduler['_target_'] if train.lr_scheduler else train.scheduler.name}",
        }))
        self.log.say(report.layers_table(self.trainables))
        self.data.token_count = lambda prompt: self.family.count_tokens(self.models, prompt)
        self.data.token_limit = 75 * cfg.model.tokenizer_repeats
        self.data.report(_Printer(self.log))

    def _cache(self) -> None:
        """Models to the device; latents are encoded once; what is not needed any more is let go."""
        self.said, self.phase = time.monotonic(), "encoding latents"
        self.models.vae.to(self.device)
        exchange = self.parallel.gather if self.parallel.world > 1 else None
        self.data.cache_latents(self._encode_latents, self.marks["vae"], self.parallel.rank, self.parallel.world, exchange, self._caching)
        if self.data.all_cached:
            self.models.vae.to("cpu")  # previews fetch it when they draw
            if not self.cfg.preview.prompts:
                self.models.drop("vae")
        self.phase = "moving the model to the device"
        for part in ("unet", "text_encoder"):
            self.models.modules[part].to(self.device)

    @torch.no_grad()
    def _encode_latents(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = self.family.posterior(self.models, pixels.to(self.device))
        return mean.cpu(), std.cpu()

    def _caching(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self.said > 5:  # a line every five seconds
            self.said = now
            self.log.say(f"latents: {done}/{total} images")

    # -- the trainer ------------------------------------------------------------------------------------------------------------------

    def _prediction(self) -> str:
        return self.models.scheduler_config.get("prediction_type", "epsilon")

    def _objective(self) -> DiscreteObjective:
        train, prediction = self.cfg.train, self._prediction()
        alphas = self.family.alphas_cumprod(self.models)
        if prediction not in PREDICTIONS:
            raise ConfigError(f"the base model's scheduler predicts {prediction!r}; supported: {', '.join(PREDICTIONS)}.")
        top = train.max_timestep or len(alphas)
        if not train.min_timestep < top <= len(alphas):
            raise ConfigError(f"train.min_timestep = {train.min_timestep}, train.max_timestep = {train.max_timestep}: 0 <= min < max <= {len(alphas)} must hold.")
        return DiscreteObjective(alphas, prediction, train.min_timestep, top)

    def _build_trainer(self) -> Trainer:
        train, self.total_steps = self.cfg.train, self._length()
        groups = [group for trainable in self.trainables for group in trainable.param_groups()]
        step, text = self._step()
        trainer = Trainer(
            feed=self.data, loss=step.losses, gradients=self._gradients(groups), optimizer=self._optimizer(groups), lr_factor=self._lr_factor(),
            parallel=self.parallel, hooks=[text] if text else [], total_steps=self.total_steps, max_grad_norm=train.max_grad_norm,
            max_nonfinite=train.max_nonfinite, fp16=self.dtype == torch.float16)
        trainer.state.positions = self.data.plan.start_of(0)
        if self.resumed:
            for line in self.resumed.differences(self.described, self.trainables, train.resume_force):
                self.log.say(line)
            start = self.data.plan.start_of(self.resumed.state["positions"][0][0])
            state = self.resumed.placed([data.name for data in self.data.datasets], [(p.epoch, p.chunk) for p in start])
            restore(trainer, self.trainables, state, Position, frozenset(train.optimizer) - {"_target_", "_partial_"})
        return trainer

    def _gradients(self, groups: list) -> Gradients:
        largest = max(data.batch_size for data in self.cfg.data.values())
        return Gradients(groups, self.device, self.parallel.world, len(self.cfg.data) * self.accumulation, largest)

    def _step(self) -> tuple[DenoisingStep, FrozenText | None]:
        cfg = self.cfg
        encode = Encoder(self.models, cfg.model.tokenizer_repeats, cfg.model.clip_skip)
        learns_text = any("text" in trainable.touches for trainable in self.trainables)
        text = None if learns_text else FrozenText(encode, self.data.epoch_prompts, self.device)
        step = DenoisingStep(self.models, self._objective(), make_loss(cfg.train.loss.type, cfg.train.loss.delta), text or encode, self.device, self.dtype,
                             cfg.train.noise_offset, cfg.train.loss.min_snr_gamma)
        return step, text

    def _optimizer(self, groups: list) -> torch.optim.Optimizer:
        scale = 1.0
        if self.cfg.train.scale_lr:
            scale = next(iter(self.cfg.data.values())).batch_size * self.parallel.world * self.accumulation
        optimizer = build(self.cfg.train.optimizer, "optimizer", "train.optimizer", self.allow, params=optimizer_groups(groups, scale))
        for group, own in zip(optimizer.param_groups, groups):
            group["initial_lr"] = own.lr * scale  # some optimizers overwrite it
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()  # schedule-free ones are made in neither mode
        return optimizer

    def _lr_factor(self) -> Callable[[int], float]:
        spec = self.cfg.train.lr_scheduler
        if spec is None:
            return lr_factor(self.cfg.train.scheduler, self.total_steps)
        return simulated_factor(lambda optimizer: build(spec, "lr_scheduler", "train.lr_scheduler", self.allow, optimizer=optimizer), self.total_steps)

    def _hooks(self) -> list:
        """Of rank 0 those that write; of every rank its share of the previews."""
        train = self.cfg.train
        log = LogHook(self.log, train.log_step, self.data.steps_per_epoch)
        hooks = [log, self._save_hook(log)] if self.parallel.main else []
        if self.cfg.preview.prompts:
            hooks.append(PreviewHook(self._draw, self.folder, self.cfg.preview.every, self.log, self.parallel))
        return hooks

    def _save_hook(self, log: LogHook) -> SaveHook:
        train = self.cfg.train
        policy = SavePolicy(train.save_step, machine.DTYPES[train.save_dtype], train.keep_states, train.keep_last, train.keep_every, train.on_save_error)
        return SaveHook(self.folder, self.trainables, self._metadata(), policy, self.described, log, self.resumed and self.resumed.state["weights"])

    def _draw(self) -> list:
        """This process's share of the preview prompts, drawn."""
        from ..vis.preview import draw_previews, encode_preview_prompts

        clip_skip = self.cfg.model.clip_skip
        prompts = self.preview_prompts
        if prompts is None:
            prompts = encode_preview_prompts(self.models, self.cfg.preview, clip_skip)
            if not any("text" in trainable.touches for trainable in self.trainables):
                self.preview_prompts = prompts  # a frozen encoder says the same every time
        size = self.data.first_size()
        return draw_previews(self.models, self.family, self.cfg.preview, width=size[0], height=size[1], prompts=prompts, clip_skip=clip_skip,
                             share=(self.parallel.rank, self.parallel.world), between=self._give_up_on_a_signal)

    def _give_up_on_a_signal(self) -> None:
        if self.stop.signal:
            raise HCPError("a signal asks to stop")

    def _metadata(self) -> dict[str, str]:
        cfg = self.cfg
        train = {key: value for key, value in self.loaded.plain["train"].items() if key not in ("resume", "resume_force")}  # a resumed run writes the same files
        settings = {"seed": cfg.seed, "train": train, **{t.key: self.loaded.plain[t.key] for t in self.trainables}}
        return {"family": self.family.name, "base_version": self.family.base_version(self.models), "base_model": self.models.name, "base_mark": self.marks["unet"],
                "versions": json.dumps(report.versions()), "settings": json.dumps(settings)}

    @functools.cached_property
    def described(self) -> dict:
        """What `compare` needs to know of this run; of the data as it was at the start, not as it is when a state is saved."""
        alphas = {f"{t.component.name}.{path}": lora.alpha for t in self.trainables for path, lora in t.adapters.items()}
        return {"versions": report.versions(), "device": machine.describe(self.device), "world": self.parallel.world, "accumulation": self.accumulation, "marks": self.marks,
                "alphas": alphas, "data": data_fingerprint(self.data.datasets), "config": self.loaded.plain}


def collect(faults: list[str], check: Callable[[], object]) -> None:
    """Runs one check and keeps its faults, so that several checks are told in one message."""
    try:
        check()
    except HCPError as error:
        faults += error.faults


class _Printer:
    """The loggers in the place of a rich console."""

    def __init__(self, log: LoggerGroup):
        self.log = log

    def print(self, renderable: object, **style) -> None:
        """One table or line."""
        self.log.say(renderable)
