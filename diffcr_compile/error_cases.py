"""What each error code means and what to do: the source of ``docs/errors.md``.

Standard library only: this file goes on the device with the runtime. A code is never given to another
case; one that is no longer raised is deleted and its number left free.
"""

from __future__ import annotations

import dataclasses

DOCUMENT = "docs/errors.md"


@dataclasses.dataclass(frozen=True)
class ErrorCase:
    """One documented case.

    Attributes:
        code: such as ``DCR-U009``; the letter stands for the class of the error.
        title: what went wrong, in a few words.
        cause: how one gets there.
        remedy: what to do next.
    """

    code: str
    title: str
    cause: str
    remedy: str

    @property
    def anchor(self) -> str:
        """Where the case is described."""
        return f"{DOCUMENT}#{self.code.lower()}"


_ROWS = (
    # ---------------------------------------------------------------- bugs
    ("DCR-X000", "a bug", "Something happened that the compiler did not expect.",
     "Run the same command with -v for the traceback and report it with the output of diffcr doctor."),
    # ---------------------------------------------------------------- usage, exit status 2
    ("DCR-U000", "an argument or a setting is wrong", "The message says which, what was found and what is expected.",
     "Change it as the message says."),
    ("DCR-U001", "MODEL is not understood", "A model is named as demo, python:<module>:<factory> or diffusers:<folder>[#component].",
     "Write one of these forms; a file my_model.py beside you with a function make() is python:my_model:make."),
    ("DCR-U002", "the factory cannot be imported", "The module or the function of python:<module>:<factory> is not there, or raised while it was imported.",
     "Run python -c 'import <module>' in the same folder and mend what it says."),
    ("DCR-U003", "the factory returned something else", "A factory returns (model, example_inputs) or (model, example_inputs, conditions), the model a torch.nn.Module.",
     "Return such a tuple; example_inputs is a dict of keyword arguments or a tuple of positional ones."),
    ("DCR-U004", "the model's folder is missing or damaged", "Models are read from disk only, nothing is downloaded; code and pickled weights that lie in a folder are not read.",
     "Name a folder that save_pretrained wrote."),
    ("DCR-U005", "a single model without example inputs", "One model, unlike a pipeline, does not say what it is called with.",
     "Pass --inputs with a safetensors file that has one tensor per argument of forward."),
    ("DCR-U006", "a file of inputs is missing or damaged", "--inputs or --pipeline-inputs names no file, or no safetensors file.",
     "Check the path; it is taken from the current folder. Write tensors with safetensors.torch.save_file."),
    ("DCR-U007", "the pipeline's inputs cannot be read", "The file of --pipeline-inputs is neither YAML nor JSON.",
     "Write the arguments of the pipeline's call as name: value lines."),
    ("DCR-U008", "the pipeline's inputs have the wrong form", "The file must hold one call's arguments by name, or a list of such.",
     "Write a mapping such as `prompt: a boat`, or a list of mappings."),
    ("DCR-U009", "a setting that does not exist", "Unknown keys are refused, because a misspelt setting would otherwise be ignored.",
     "Use the name that the message suggests; diffcr init lists them all."),
    ("DCR-U010", "a setting has a wrong value", "The value has another type or lies outside its range.",
     "The message has the range; diffcr init shows each setting with its default."),
    ("DCR-U011", "the configuration file is missing", "--config names no file.",
     "diffcr init MODEL > diffcr.yaml writes one."),
    ("DCR-U012", "the configuration file is not YAML", "The file cannot be parsed, or is no mapping of sections.",
     "Mend the line that the message names; compare with diffcr init."),
    ("DCR-U013", "--set without a value", "--set takes section.key=value.",
     "Write --set calibration.steps=200."),
    ("DCR-U014", "the budget is no share", "A budget is a share of the dense model's cost in (0%, 100%].",
     "Write --budget 60% or --budget 0.6."),
    ("DCR-U015", "the budget cannot be reached", "What stays dense, the smallest keep ratio and the rounding to whole tokens leave more than was asked for.",
     "Ask for the smallest budget that the message names, or lower routing.min_keep_ratio, allow routing.skip_blocks, or exclude fewer blocks."),
    ("DCR-U016", "the output folder holds something else", "An artifact is written into a new folder or goes on in its own; other files are never mixed in.",
     "Name a new folder with -o."),
    ("DCR-U017", "the output folder is in use", "Another process compiles, exports, builds or checks engines in it; the message names it. The lock ends with its process, also if that is killed, so the file .lock is never in the way.",
     "Wait for it, or name another folder."),
    ("DCR-U018", "there is no report", "The folder was not finished by diffcr compile or demo.",
     "Run the compilation again with the same -o: it goes on where it stopped."),
    ("DCR-U019", "-v together with -q", "One asks for more lines, the other for fewer.", "Leave one of them out."),
    ("DCR-U020", "an input is missing or unknown", "A compiled model takes exactly the inputs it was built with, by name.",
     "Compare with the list in the message."),
    ("DCR-U021", "a shape or type that was not built", "Shapes and types are fixed in the graphs: resolution, batch and sequence length.",
     "Call it with what the message lists, or compile again with example inputs of the size you need."),
    ("DCR-U022", "timesteps of several buckets in one call", "Each timestep bucket has a graph of its own, and one call runs one graph.",
     "Split the call by timestep."),
    ("DCR-U023", "another value of what is fixed", "Arguments that are no tensors, and tensors whose values forward reads, are constants of the graph.",
     "Leave the argument as it was, or compile again with the value you need."),
    ("DCR-U024", "freeze was given none, several or something else", "dcr.freeze takes exactly one of result, keep_ratio and schedule.",
     "Pass one of them: what dcr.calibrate returned, a number by the name keep_ratio, or a TokenSchedule by the name schedule."),
    ("DCR-U025", "a graph of another stage", "dcr.calibrate and dcr.freeze take what dcr.route made, dcr.export what dcr.freeze made.",
     "Pass the result of the step before."),
    ("DCR-U026", "neither a model with inputs nor a pipeline", "dcr.compile, route and inspect take a torch.nn.Module with example_inputs, or a pipeline without.",
     "Pass example_inputs= with a model and pipeline_inputs= with a pipeline."),
    ("DCR-U027", "an unknown target", "There is no device of that name.", "Use one of the names in the message."),
    ("DCR-U030", "diffcr run on another model", "Only the reference model's sampler is known to the tool.",
     "Load the artifact with dcr.load and use your own sampler, or put it into its pipeline."),
    ("DCR-U032", "a sequence of sizes in the wrong form", "A schedule, a set of keep ratios or bucket edges does not fit the model.",
     "The message names the entry and its range."),
    ("DCR-U033", "the log cannot be written", "--log-json names a file in a folder that does not exist or is not writable.",
     "Name a file in a folder that exists."),
    ("DCR-U037", "a target's file is wrong", "A target is described in YAML with the keys of the shipped ones.",
     "Compare with export/targets; the message names the key."),
    ("DCR-U050", "the routed model's weights were changed", "dcr.remove promises the model bit for bit, and something wrote to weights that it shares with the routed graph.",
     "Load the model anew, or pass accept_changes=True to keep the weights as they are now."),
    ("DCR-U051", "another model than the artifact's", "Graphs are made again around the dense model only where they then give the golden outputs.",
     "Pass the dense model with the weights that the artifact was compiled from."),
    ("DCR-U052", "the dense model is needed", "FROZEN graphs in torch stand around the dense model, and only classes of diffusers are known by their name.",
     "Pass the dense model as model=."),
    ("DCR-U053", "the diffcr backend of torch.compile cannot be used so", "It takes options={'artifact': folder}, runs without gradients, and needs the whole model in one graph.",
     "Change what the message names; DiffusersTransformer.from_artifact(folder, backend='torch', model=model) needs no Dynamo."),
    ("DCR-U054", "a block that does not exist", "An entry of routing.include or routing.exclude fits no block, so it would silently do nothing.",
     "Take a name from the list in the message (diffcr inspect shows all), or write re:<regular expression>."),
    ("DCR-U055", "guidance is not decided", "A pipeline that guides calls its denoiser twice per image; graphs are static, so that is built in.",
     "Set export.cfg to batched, separate or none, as the message explains."),
    ("DCR-U056", "nothing to go on with", "diffcr freeze and diffcr export go on in a folder where diffcr calibrate began.",
     "Begin with diffcr calibrate MODEL -o FOLDER; what was begun in Python goes on there."),
    ("DCR-U057", "what was learned does not fit", "Routers, ratios and weights of an artifact (learned_from=, --learned-from) fit the same model with the same blocks routed in the same way.",
     "Leave out the settings that differ, or calibrate this one by itself."),
    ("DCR-U058", "a value that the graph cannot take", "An input has the shape and type that were built, but a value that points nowhere, such as a class label beyond the end of its table.",
     "Give values that the dense model takes; the message of ONNX Runtime has the value and its range."),
    ("DCR-U060", "the latency table is missing", "budget.table names no file.",
     "Measure one with diffcr bench MODEL --table FILE, with the same settings of the routing."),
    ("DCR-U061", "a latency table that does not serve here", "It was measured on another model, batch or set of levels, or its figures were not stable.",
     "Measure it again with the settings that you compile with, on a quiet machine; --stability says how exact it must be."),
    ("DCR-U062", "latents or a sampler that do not fit", "dcr.LatentStates was given no latents, wrong shapes or inputs, timesteps out of range, or a scheduler that does not mix as the prediction type says; or a sampler that draws noise in its steps, or that the model's output is no velocity for.",
     "Change what the message names; see dcr.LatentStates and dcr.SchedulerSampler."),
    ("DCR-U063", "nothing to suggest from", "No budget that was asked for is reachable, or a timestep bucket has too few states to learn from and to check with.",
     "Ask for budgets above the smallest that the message names; raise rollouts.trajectories."),
    ("DCR-U070", "ranks that start from different things", "Processes that calibrate together have different weights or training states.",
     "Load or seed the model, and give the data, alike in all of them."),
    ("DCR-U071", "ranks without a common folder", "A rank cannot read the rollouts that another one wrote.",
     "Name an output folder that all machines have in common."),
    ("DCR-U072", "training states that do not fit the model", "Names, types, shapes or numbers of the states given as data are not the model's, or its inputs do not tell states apart by timestep.",
     "Mend what the message names; compare with the example inputs."),
    ("DCR-U073", "timesteps out of range", "Training states have timesteps outside of the timestep buckets, or the sampler has no step in one of these.",
     "Set routing.timestep_low and routing.timestep_high to the range of the model's timestep input, set fewer buckets, or mend the data."),
    ("DCR-U074", "more ranks than states in a step", "A step's states are shared by all processes, and some would have none.",
     "Start fewer processes, or set a larger calibration.batch."),
    ("DCR-U075", "nothing for adapters to sit on", "calibration.train is lora, and the routed blocks have no Linear layer that nothing else uses.",
     "Set calibration.train to router or all."),
    ("DCR-U076", "sampling steps that cannot be distilled", "rollouts.substeps is above 1, and the sampler has no smaller steps, remembers earlier ones or clips; or the calibration does not learn from rollouts.",
     "Use flow matching or DDIM with timestep_spacing=\"trailing\" and clip_sample=False, or set rollouts.substeps to 1."),
    ("DCR-U077", "weights in half precision cannot be trained", "calibration.train is all or lora, and the weights that it trains are fp16 or bf16, where small steps are rounded away or overflow.",
     "Call .float() on the model and give fp32 inputs; calibration.precision: bf16 brings the speed back. Or set calibration.train to router."),
    ("DCR-U078", "an argument is something else", "A public function was given another kind of object, or another word, than it takes.",
     "The message says which argument and what is expected."),
    ("DCR-U079", "weights that cannot be shared out", "calibration.shard needs several processes, and routed blocks whose weights are used by nothing else.",
     "Start the command under torchrun; or set calibration.shard: false."),
    # ---------------------------------------------------------------- model, exit status 3
    ("DCR-M000", "the model is not supported", "The message says what in it.", "Change what the message names, or try diffcr inspect for the whole list."),
    ("DCR-M001", "no block can be routed", "Every candidate was refused, each with its reason, or there are no blocks.",
     "Read the reasons; routing.granularity=mlp routes feed-forwards where whole blocks mix positions."),
    ("DCR-M002", "something is attached to the model", "Hooks, adapters or offloading around a module would be lost in a graph.",
     "Take them off with the call that the message names; LoRA may be fused with routing.fuse_adapters=true."),
    ("DCR-M003", "the graphs do not suit the target", "A graph has an operator, a type or a TopK that the device's importer refuses.",
     "Read the reasons of diffcr lint; compile again with export.target set to the device."),
    ("DCR-M004", "TensorRT refuses a graph", "Its parser or its builder does not take an operator, a type or a size; the message says which.",
     "Run diffcr lint --target for the device; compile again with export.target set to it."),
    ("DCR-C000", "the model cannot be captured", "torch.export gives no static graph of it: branches on values, numbers read from tensors.",
     "Move what the message names out of forward, or make it depend on shapes only."),
    # ---------------------------------------------------------------- environment, exit status 4
    ("DCR-E000", "a package, a version or a device is missing", "The message names it and who needs it.", "Install what the message names; diffcr doctor lists all."),
    ("DCR-E001", "the execution provider is missing", "The installed ONNX Runtime has no such provider; it would silently run elsewhere.",
     "Install diffcr-compile[gpu], or ask for provider='cpu'."),
    ("DCR-E002", "TensorRT or cuda-python is missing", "Engines are built with TensorRT and run with TensorRT and cuda-python.",
     "On a Jetson use the system's python3, which has JetPack's TensorRT; diffcr doctor --device says what is there."),
    ("DCR-E003", "no GPU", "CUDA finds no device in this process.",
     "Run it on the device, or use backend='onnxruntime'; on a machine without a GPU build ahead of time only."),
    ("DCR-E010", "another process of the calibration is gone", "One of the processes that calibrate together was killed, failed, or cannot be reached.",
     "Read what it printed, and start all of them again with the same settings: they go on from the last saved state."),
    ("DCR-E011", "peft is missing", "calibration.train is lora, whose adapters are peft's.",
     "pip install diffcr-compile[lora]."),
    ("DCR-E012", "a package of the pipeline is missing", "The model is read by diffusers, which is not installed, is older than the pipeline, or lacks a package such as transformers.",
     "pip install -U diffcr-compile[diffusers], and what else the message names."),
    ("DCR-E013", "ModelOpt is missing", "export.precision is int8, whose ranges NVIDIA ModelOpt finds.",
     "pip install diffcr-compile[int8], or export with precision fp16."),
    ("DCR-E014", "bfloat16 on a CPU", "The artifact computes in bf16, and ONNX Runtime's CPU has no kernels for it.",
     "Run it with provider='cuda' or as engines; diffcr validate checks it on a CPU all the same."),
    # ---------------------------------------------------------------- resources, exit status 5
    ("DCR-R000", "memory or disk does not suffice", "The message has what is needed and what is there.", "Free some, or lower what the message names."),
    ("DCR-R001", "the output folder cannot be written", "The folder, or the one above it, is not writable, the disk is full, or it answers with errors. What was finished before is unchanged, and no file is left half written.",
     "Free some space (the message has what is needed and what is free), make the folder writable or name another one with -o, and run the same command again: it goes on where it stopped."),
    ("DCR-R002", "an engine build was killed", "The system ended the process of the build, nearly always because memory ran out: on a board the GPU and the host share it.",
     "Free memory (other processes, the desktop), add swap on a disk in place of ZRAM, lower --workspace, and run the same command again: it goes on at the engine it was in."),
    ("DCR-R003", "the device has too little memory", "The engines need more than is free.",
     "Load with swap=True, use the mode profiles, free memory, or compile a smaller model or batch."),
    ("DCR-R004", "a call to CUDA failed", "The driver, another process or an earlier call broke the context.",
     "Start the process again; if it comes back, run diffcr doctor --device."),
    ("DCR-R010", "out of memory", "Rollouts or a calibration step need more memory than the machine or the device has.",
     "Lower the settings that the message names, in that order."),
    ("DCR-R011", "the training states are too large", "Their size is known beforehand and exceeds rollouts.max_gib or the free disk.",
     "Lower the setting that the message names, or allow more."),
    # ---------------------------------------------------------------- accuracy, exit status 6
    ("DCR-Q000", "a gate of accuracy was not met", "A graph computes something else than the one it was made from, beyond the tolerance.",
     "The message names step and bucket; look at the parity ladder in the report."),
    ("DCR-Q001", "an artifact no longer gives its golden outputs", "ONNX Runtime of this machine computes something else than on the host.",
     "Install the versions that the manifest names, then validate again; report it if that does not help."),
    ("DCR-Q002", "an engine does not give the golden outputs", "TensorRT computes something else than the graphs do; wrong results of some versions are known.",
     "Build in the other mode (--mode per_bucket), or with a newer JetPack; diffcr validate --level engine --bisect names the block."),
    ("DCR-Q010", "the calibration diverged", "A loss, a gradient or a measured error became NaN or infinite. The state before that step is saved where the message says.",
     "Lower the learning rates or set calibration.precision to fp32; with other settings the calibration starts anew."),
    ("DCR-Q011", "adapters cannot be merged", "A block reads the weight of a Linear layer instead of calling the layer, so that an adapter around the layer and one merged into it differ.",
     "Set calibration.train to all or router."),
    # ---------------------------------------------------------------- artifact, exit status 7
    ("DCR-A000", "an artifact cannot be used", "The message says what about it.", "Copy it again, or make it anew with diffcr compile."),
    ("DCR-A001", "no finished artifact", "The folder has no manifest.json; it is written last.",
     "Name a folder that diffcr compile made, or run that again: it goes on where it stopped."),
    ("DCR-A002", "the manifest is damaged", "manifest.json cannot be read or lacks keys.", "Copy the artifact again, or make it anew."),
    ("DCR-A003", "an artifact of another version", "The manifest has another schema version.", "Install the version that made it, or make it anew."),
    ("DCR-A004", "a file is missing or was changed", "A file's size or sha256 differs from the manifest's.", "Copy the artifact again, or make it anew."),
    ("DCR-A005", "a file that does not belong", "A checked folder of the artifact holds a file that the manifest does not list.", "Delete it."),
    ("DCR-A006", "a path out of the artifact", "The manifest or a link leads out of the folder.", "Do not use this artifact."),
    ("DCR-A007", "a graph that is not the artifact's", "An ONNX file reads other files, uses operators that are not standard, or is damaged, whatever the manifest says.",
     "Do not use this artifact; make it anew."),
    ("DCR-A008", "a plan of engines is wrong", "It names engines and profiles that do not cover every timestep bucket exactly once, or has another form.",
     "Make it anew from the artifact with diffcr build."),
    ("DCR-A015", "code that an artifact names is not imported", "The recipe names a class that diffusers does not have; anything else is never imported for an artifact.",
     "Install the version of diffusers that the artifact was made with, pass the dense model, or do not use the artifact."),
    ("DCR-A014", "an artifact without a recipe", "model/recipe.json, which says how the model is called, is missing.",
     "Make the artifact anew, or use CompiledDenoiser(folder, dense_model), which needs none."),
    ("DCR-A009", "there are no engines", "Engines are built on the device that runs them.", "Run diffcr build, or build_on_device.sh, on the device."),
    ("DCR-A010", "engines of another device or version", "An engine runs only on the kind of board and GPU, with the memory and with the TensorRT that it was built with.",
     "Build them again on this device."),
    ("DCR-A011", "an engine is missing or was changed", "A plan's size or sha256 differs from its sidecar's, or the sidecar is damaged.", "Build the engines again."),
    ("DCR-A012", "engines of another artifact", "They were made of other graphs or weights, or for other timestep buckets, kept tokens, inputs or outputs.", "Build the engines again."),
    ("DCR-A013", "engines that nobody checked", "engine.ok.json is written after every timestep bucket gave its golden outputs on the device; without it nothing runs.",
     "Run diffcr validate --level engine on the device."),
    ("DCR-A020", "a latency table is damaged or was changed", "The file is no table of this version, or its checksum does not fit what it says.",
     "Measure it again with diffcr bench MODEL --table FILE; tables are not edited by hand."),
    ("DCR-A021", "a latency kit is damaged or was changed", "The folder lacks kit.json, or a graph in it is not the one that was written.",
     "Copy it again, or write it anew with diffcr bench MODEL --kit."),
    # ---------------------------------------------------------------- inside, exit status 1
    ("DCR-P000", "a pass could not finish", "A compiler pass met a graph it cannot edit.", "Report it, with the model if you may."),
    ("DCR-P001", "a pass was given what it does not take", "Passes were run in another order than their rules say.", "Run the pass that the message names first."),
    ("DCR-P002", "a pass broke its promise", "The graph after a pass is not what the pass promises.", "Report it, with the model if you may."),
    ("DCR-V000", "a program breaks a rule of its stage", "The verifier, which runs after every pass, found the node that the message names.", "Report it, with the model if you may."),
)  # fmt: skip

CASES: dict[str, ErrorCase] = {row[0]: ErrorCase(*row) for row in _ROWS}
