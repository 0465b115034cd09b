"""The only place that wires a run together: config -> model, data, trainables -> trainer, hooks, loggers."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from .. import device as machine
from ..config.build import build, check_target
from ..config.load import Loaded
from ..config.schema import RunConfig
from ..data.dataset import build_train_data
from ..data.fingerprint import fingerprint as data_fingerprint
from ..data.plan import Position
from ..errors import ConfigError, FeedError, HCPError, Interrupted, collect, signal_name
from ..families.base import DENOISER, denoiser_of, text_components
from ..loggers import LoggerGroup
from ..trainables.lora import lay_groups
from . import report
from .base import BaseModel
from .compare_config import is_done
from .compiled import check_compile, compile_failed, compile_regions, heartbeat
from .export import WebuiExport, check_export
from .export_facts import export_facts
from .hooks import LogHook
from .init import check_places, start_from_files
from .latents import Telling, cache_latents
from .memory import less_memory
from .parallel import Parallel
from .parts import learns_text, make_gradients, make_lr_factor, make_optimizer, make_shadow, make_step
from .place import RunPlace
from .previews import Drawing, PreviewHook, check_previews, encode_ahead
from .probe import probe
from .save import SaveHook, SavePolicy
from .signals import PATIENCE, StopRequest
from .state import restore
from .trainer import Trainer

USUAL = (8, 4)  # geometry of every usual model: where the model is not found, only faults of the data depend on it


class Run:
    """One training run. Everything that can be wrong is found before the run folder is made; then latents are cached and the steps begin."""

    def __init__(self, loaded: Loaded[RunConfig], parallel: Parallel, allow: Sequence[str] = (), stop: StopRequest | None = None):
        """stop: signals as they come; None: nobody listens to them here."""
        self.loaded, self.cfg, self.parallel, self.allow, self.stop = loaded, loaded.config, parallel, allow, stop or StopRequest()
        self.place = RunPlace(loaded, parallel)
        self.device, self.started = parallel.device, time.monotonic()
        self.dtype = machine.compute_dtype(self.cfg.mixed_precision, self.device)
        self.accumulation = self.cfg.train.gradient_accumulation_steps
        self.phase, self.base, self.beat = "loading the model", None, None
        self.log = LoggerGroup([])

    @property
    def folder(self) -> Path | None:
        """The run folder, once there is one."""
        return self.place.folder

    def train(self) -> int:
        """Runs from start to end; returns the exit code: 0, or 128 + the number of the signal that stopped it."""
        try:
            self._set_up_machine()
            self._read_inputs()
            self._load_model()
            self._attach_adapters()
            trainer = self._build_trainer()
            self._report(trainer.state.step)
            self._cache(trainer)
            self._place_models()
            with heartbeat(self.log.say) if self.compiled else nullcontext() as self.beat:
                self._first_pass(trainer)
                self._make_folder(trainer.state.step)
                trainer.hooks += self._hooks()
                self.phase = "training"
                self.stop.told = functools.partial(self._answer, trainer)
                finished = trainer.fit(self.stop)
            self._say_the_end(finished, trainer.state.step)
        except torch.OutOfMemoryError as error:
            raise HCPError(f"out of memory while {self.phase}. {less_memory(self.cfg, self.phase)}") from error
        except RuntimeError as error:
            lost = compile_failed(error)
            if lost is None:
                raise
            raise lost from error
        except FeedError as error:
            last = error.faults[-1]
            raise FeedError([*error.faults[:-1], f"{last}{'' if last.endswith('.') else '.'} {self.place.how_to_go_on(mended=True)}"]) from error
        except Interrupted as error:
            error.args = (f"{error.args[0]} while {self._when_it_was_stopped()}. {self.place.how_to_go_on()}",)
            raise
        finally:
            self.log.close()
            self.place.release()
        return 0 if finished else self._signal_code()

    def _when_it_was_stopped(self) -> str:
        """The phase in which the last signal came; a part of the model that is compiled in its midst is one of its own."""
        return "compiling" if self.beat and self.beat.compiled_at(self.stop.came) else self.phase

    def _answer(self, trainer: Trainer, number: int) -> None:
        """Says at once what becomes of a signal, from a thread: its step may take minutes. A device that works ahead of the host gets one step further, and so does
        a step that had asked for signals before this one came."""
        last = min(trainer.state.step + 1 + trainer.lag, self.total_steps)
        self.log.say(f"{signal_name(number)}: step {last}{f' or {last + 1}' if last < self.total_steps else ''} will be finished and saved; once more ({PATIENCE:.0f} s later or more) stops at once.")

    def _say_the_end(self, finished: bool, step: int) -> None:
        self.log.say(f"{'done' if finished else 'stopped'}: step {step} after {time.monotonic() - self.started:.0f} s, peak memory {machine.peak_memory(self.device)}. "
                     f"Everything is in {self.folder}")
        if not finished:
            self.log.say(self.place.how_to_go_on())

    def _signal_code(self) -> int:
        """The exit code of the first process that got a signal."""
        return next((code for code in self.parallel.gather(self.stop.signal and self.stop.exit_code) if code), self.stop.exit_code)

    # -- before anything is written: every fault is found here ---------------------------------------------------------------------------------

    def _open_loggers(self) -> None:
        if self.parallel.main:
            self.log = LoggerGroup([build(spec, "logger", f"logger[{i}]", self.allow) for i, spec in enumerate(self.cfg.logger)])
        for file in self.loaded.files:
            self.log.say(f"config: {file}")
        self._say_notices([*self.loaded.notices, *self.base.notices, *self.base.size_notes(self.cfg.data)])

    def _say_notices(self, notices: Sequence[str] = ()) -> None:
        for notice in (*notices, *self.place.take_notices()):
            self.log.say(notice if notice.startswith(("warning:", "note:")) else f"note: {notice}")

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
        collect(faults, lambda: check_places(self.cfg.model))
        collect(faults, lambda: check_compile(self.cfg.model, self.device))
        collect(faults, lambda: faults.extend(check_target(self.cfg.train.optimizer, "optimizer", "train.optimizer", self.allow)))
        if self.cfg.train.lr_scheduler:
            collect(faults, lambda: faults.extend(check_target(self.cfg.train.lr_scheduler, "lr_scheduler", "train.lr_scheduler", self.allow)))
        self.phase = "looking at its inputs"
        collect(faults, self.place.find)
        collect(faults, self._index_data)
        faults = self.parallel.faults(faults)
        if faults:
            raise ConfigError(faults)
        self._open_loggers()

    def _find_model(self) -> None:
        self.base = BaseModel(self.cfg.model)

    def _index_data(self) -> None:
        factor, channels = self.base.geometry if self.base else USUAL
        self.data = build_train_data(self.cfg.data, seed=self.cfg.seed, vae_factor=factor, latent_channels=channels, micro_per_step=self.parallel.world * self.accumulation,
                                     workers=self.cfg.train.workers)

    def _load_model(self) -> None:
        self.phase = "loading the model"
        folders = [Path(data.cache_dir) for data in self.data.datasets if data.cache == "disk"]
        self.models = self.base.load(self.dtype, self.allow, next(iter(folders), None))
        self.attention = machine.set_attention(self.models.modules[denoiser_of(self.base.family).name], self.cfg.model.attention, "model.attention")

    def _attach_adapters(self) -> None:
        self.trainables, faults = [], []
        for key in dict.fromkeys(component.config_key for component in self.base.family.components):
            groups = getattr(self.cfg, key)
            if groups:
                collect(faults, lambda: self.trainables.extend(lay_groups(self.models, key, groups, self.cfg.seed)))
        collect(faults, self.base.check_clip_skip, lambda: self.base.objective(self.cfg.train), lambda: check_previews(self.models, self.cfg), self._check_export)
        if faults:
            raise ConfigError(faults)
        for notice in (*start_from_files(self.cfg.model, self.trainables, self.base.family.base_version(self.models)), *self.base.unread_layers(self.trainables)):
            self.log.say(notice)
        for trainable in self.trainables:
            for lora in trainable.adapters.values():
                lora.to(self.device)  # the optimizer is made of these, before the frozen weights follow
        if self.cfg.model.gradient_checkpointing:
            self.base.checkpoint_gradients([trainable.component.name for trainable in self.trainables])
        self._compile()

    def _compile(self) -> None:
        """The parts that gradients go through; what is frozen and runs before the steps is not worth it."""
        self.compiled = ""
        if self.cfg.model.compile:
            parts = dict.fromkeys([denoiser_of(self.base.family).name, *(trainable.component.name for trainable in self.trainables)])
            self.compiled = compile_regions(self.models, parts, self.data.plan.shapes(), self.attention)

    def _check_export(self) -> None:
        check_export(self.cfg.train.export, self.base.family.base_version(self.models), self.trainables)

    # -- the trainer ------------------------------------------------------------------------------------------------------------------

    def _length(self) -> int:
        resumed, total = self.place.resumed, self.cfg.train.train_steps or self.cfg.train.train_epochs * self.data.steps_per_epoch
        if resumed and resumed.step >= total:
            raise ConfigError(is_done(self.folder, resumed.step, total))
        return total

    def _build_trainer(self) -> Trainer:
        self._compare()
        train, self.total_steps, self.frozen = self.cfg.train, self._length(), not learns_text(self.trainables)
        groups = [group for trainable in self.trainables for group in trainable.param_groups()]
        step, self.text = make_step(self.base, self.cfg, self.data, self.frozen, self.parallel, self.dtype, self.log.say)
        trainer = Trainer(
            feed=self.data, loss=step.losses, gradients=make_gradients(groups, self.cfg, self.parallel), optimizer=make_optimizer(groups, self.cfg, self.parallel.world, self.allow),
            lr_factor=make_lr_factor(train, self.total_steps, self.allow), parallel=self.parallel, hooks=[self.text] if self.text else [], total_steps=self.total_steps,
            max_grad_norm=train.max_grad_norm, max_nonfinite=train.max_nonfinite, fp16=self.dtype == torch.float16,
            shadow=make_shadow(self.trainables, self.cfg, self.dtype), less_memory=less_memory(self.cfg))
        trainer.state.positions = self.data.plan.start_of(0)
        if self.place.resumed:
            self._go_on(trainer)
        return trainer

    def _compare(self) -> None:
        """Refuses to go on with another run. Before anything else of it is judged: a wrong config is told as one, not as a number of steps that is too low."""
        if self.place.resumed:
            for line in self.place.resumed.differences(self.described, self.trainables, self.cfg.train.resume_force):
                self.log.say(line)

    def _go_on(self, trainer: Trainer) -> None:
        resumed = self.place.resumed
        start = self.data.plan.start_of(resumed.state["positions"][0][0])
        state = resumed.placed([data.name for data in self.data.datasets], [(p.epoch, p.chunk) for p in start])
        restore(trainer, self.trainables, state, Position, frozenset(self.cfg.train.optimizer) - {"_target_", "_partial_"}, f"train.resume: {resumed.mark}")

    def _report(self, step: int) -> None:
        precision = f"{machine.SHORT[self.dtype]} (LoRA weights fp32), attention {self.attention}"
        length = f"{self.total_steps} steps, {self.data.steps_per_epoch} an epoch" + (f"; {self.folder} resumed after step {step}" if step else "")
        facts = report.run_facts(self.cfg, self.base, self.parallel, precision, length) | ({"compiled": self.compiled} if self.compiled else {}) | report.memory_facts(self.cfg, self.data)
        self.log.say(report.facts_table("run", facts))
        self.log.say(report.layers_table(self.trainables))
        self.data.token_count = lambda prompt: self.base.family.count_tokens(self.models, prompt)
        self.data.token_limit = 75 * self.cfg.model.tokenizer_repeats
        self.data.report(report.Printer(self.log))

    def _cache(self, trainer: Trainer) -> None:
        """Latents and prompts are encoded once, and what encodes them is let go, before the weights of the denoiser are read."""
        self.phase = "encoding latents"
        cache_latents(self.data, self.models, self.base.marks["vae"], self.parallel, bool(self.cfg.preview.prompts), self.log.say)
        self.base.remember_marks()
        self.preview_prompts = None
        if self.text is None:
            return
        self.phase = "encoding prompts"
        if self.cfg.preview.prompts:
            with self.text.working():
                self.preview_prompts = encode_ahead(self.models, self.cfg)
        self.text.ahead(trainer.state.positions, self.total_steps - trainer.state.step, Telling("prompts", self.log.say))
        if self.text.whole:
            self.models.drop(*(component.name for component in text_components(self.base.family)))

    def _place_models(self) -> None:
        """What is trained or learnt from goes to the device; a text encoder that only encodes ahead is not among it."""
        self.phase = "reading the model"
        machine.release()
        for component in self.base.family.components:
            if component.role == DENOISER or self.text is None:
                self.base.read(component.name, self.device)

    def _first_pass(self, trainer: Trainer) -> None:
        """What takes long before the first line of a step is said, and on a GPU the largest batch is tried."""
        if self.compiled:
            others = "; a later step whose size needs kernels of its own may too" if len(self.data.plan.shapes()) > 1 else ""
            first = "step" if self.device.type == "cpu" else "pass"
            self.log.say(f"compiling: the first {first} may take minutes{others}")
        if self.device.type != "cpu":
            self.phase = "trying the largest batch"
            self.log.say(probe(trainer, self.data.largest_batch(), self.base.geometry) + (", compiling included" if self.compiled else ""))

    # -- the folder and what is made in it --------------------------------------------------------------------------------------------

    def _make_folder(self, step: int) -> None:
        self.place.make(step)
        self._say_notices()
        self.log.open(self.folder, step, self.total_steps)
        self.log.say(f"run folder: {self.folder}")

    def _hooks(self) -> list:
        """Of rank 0 those that write; of every rank its share of the previews."""
        compiles = bool(self.compiled) and self.device.type == "cpu"  # else the probe has compiled it
        log = LogHook(self.log, self.cfg.train.log_step, self.data.steps_per_epoch, compiles)
        saving, previews = [self._save_hook(log)] if self.parallel.main else [], []
        if self.cfg.preview.prompts:
            drawing = Drawing(self.models, self.cfg, self.data.main_size(), self.preview_prompts, self.parallel, self.stop)
            previews.append(PreviewHook(drawing, self.folder, self.cfg.preview.every, self.log, self.parallel))
        covered = self.cfg.train.export.webui and self.cfg.train.export.cover  # what is saved first cannot be lost while pictures are drawn; a cover has to be there before
        return [*([log] if self.parallel.main else []), *(previews + saving if covered else saving + previews)]

    def _save_hook(self, log: LogHook) -> SaveHook:
        train, resumed = self.cfg.train, self.place.resumed
        policy = SavePolicy(train.save_step, machine.DTYPES[train.save_dtype], train.keep_states, train.keep_last, train.keep_every, train.on_save_error)
        return SaveHook(self.folder, self.trainables, self._metadata(), policy, self.described, log, resumed and resumed.state["weights"], self._export(policy.save_dtype))

    def _export(self, dtype: torch.dtype) -> WebuiExport | None:
        if not self.cfg.train.export.webui:
            return None
        facts = export_facts(self.cfg, self.base, self.data, self.trainables, self.total_steps, self.parallel.world, self.described["started"], machine.SHORT[self.dtype])
        return WebuiExport(self.folder, self.cfg.train.export, self.base.family.base_version(self.models), dtype, facts, self.data.steps_per_epoch)

    def _metadata(self) -> dict[str, str]:
        train = {key: value for key, value in self.loaded.plain["train"].items() if key not in ("resume", "resume_force", "export")}  # a resumed run writes the same files
        settings = {"seed": self.cfg.seed, "train": train, **({"quantize": self.cfg.model.quantize} if self.cfg.model.quantize else {}),
                    **{t.key: self.loaded.plain[t.key] for t in self.trainables}}
        return {"family": self.base.family.name, "base_version": self.base.family.base_version(self.models), "base_model": self.models.name,
                "prediction_type": self.base.prediction, "base_mark": self.base.marks[denoiser_of(self.base.family).name], "versions": json.dumps(report.versions()),
                "settings": json.dumps(settings)}

    def _started(self) -> float:
        """When the training began, in seconds since 1970: also of a resumed run, where its first part noted it."""
        before = self.place.resumed.state["run"].get("started") if self.place.resumed else None
        return before or self.loaded.now.timestamp()

    @functools.cached_property
    def described(self) -> dict:
        """What `compare` needs to know of this run; of the data as it was at the start, not as it is when a state is saved."""
        alphas = {f"{t.component.name}.{path}": lora.alpha for t in self.trainables for path, lora in t.adapters.items()}
        started = {"started": self._started()} if self.cfg.train.export.webui else {}  # else equal runs have equal states
        return {**started, "versions": report.versions(self.cfg.train.optimizer["_target_"]), "device": machine.describe(self.device), "world": self.parallel.world, "accumulation": self.accumulation,
                "marks": self.base.marks, "learns": self.base.learns(), "alphas": alphas, "data": data_fingerprint(self.data.datasets), "config": self.loaded.plain}
