"""``build_on_device.sh``: the whole build with trtexec and coreutils, for a device without this package."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from diffcr_compile.device_state import BOARD_MODEL_FILE
from diffcr_compile.durable import atomic_write_bytes
from diffcr_compile.engine_plan import (
    ENGINE_MODES,
    EngineMode,
    EnginePlan,
    EngineSpec,
    ProfileLayout,
    plan_engines,
)
from diffcr_compile.errors import UsageError
from diffcr_compile.export.device.job import BuildSettings, job_key
from diffcr_compile.export.device.trtexec import (
    BOARD_FILE,
    MADE_FROM_FILE,
    MODE_FILE,
    UNCHECKED,
    trtexec_arguments,
    unchecked_plan,
)
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime.engine_files import graphs_hash, made_from

SCRIPT = "build_on_device.sh"

_HEAD = """\
#!/bin/sh
# Builds the engines of this folder with TensorRT's trtexec, then says how to compare them with the golden
# outputs. It needs trtexec (JetPack: /usr/src/tensorrt/bin) and coreutils, nothing else.
#
#   sh build_on_device.sh [{modes}]      the mode; {default} if none is named
#
# Interrupted or killed, run it again: engines that are finished are kept.
# Set TRTEXEC to name another trtexec, TRTEXEC_ARGS for more arguments (split at blanks).
set -eu

cd -- "$(dirname -- "$0")"
mode=${{1:-{default}}}
trtexec=${{TRTEXEC:-trtexec}}
if ! command -v -- "$trtexec" >/dev/null 2>&1; then
  trtexec=/usr/src/tensorrt/bin/trtexec
fi
if ! command -v -- "$trtexec" >/dev/null 2>&1; then
  echo "build_on_device: trtexec is not there. On a Jetson: sudo apt install tensorrt, or set TRTEXEC." >&2
  exit 4
fi

echo "checking the files against the manifest"
if ! sha256sum --check --strict --quiet <<'SUMS'
{sums}
SUMS
then
  echo "build_on_device: a file differs from the manifest. Copy the artifact again." >&2
  exit 7
fi

# TensorRT 10 is told that the graph's types count; TensorRT 11 knows nothing else and lacks the option.
help=$("$trtexec" --help 2>&1 || :)
typed=
case $help in
  *--stronglyTyped*) typed=--stronglyTyped ;;
  *) ;;
esac

# An engine belongs to one TensorRT and one board: after an update, or on another board, it is built again.
case $help in
  *"[TensorRT v"*)
    version=${{help#*"[TensorRT v"}}
    version=${{version%%"]"*}}
    ;;
  *) version=$(sha256sum <"$(command -v -- "$trtexec")") ;; # it says no version, so the program itself stands for it
esac
board=
if [ -r {model_file} ]; then
  board=$(tr -d '\\000' <{model_file})
fi

mkdir -p {folder}
rm -f -- {folder}/{mode_file} # until all engines of a mode are there, those of another run are not to be taken

# build NAME KEY PLAN ARGUMENT...: run trtexec unless PLAN is whole and was built with the same KEY.
build() {{
  name=$1 key="$2, TensorRT $version, ${{board:-no board}}" plan=$3
  shift 3
  if [ -f "$plan.key" ] && [ "$(cat -- "$plan.key")" = "$key" ] &&
    sha256sum --check --status -- "$plan.sha256" 2>/dev/null; then
    echo "$name: built already"
    return 0
  fi
  rm -f -- "$plan" "$plan.key" "$plan.sha256" "$plan.partial"
  echo "$name: building, see $plan.log"
  status=0
  # shellcheck disable=SC2086 # TRTEXEC_ARGS is meant to be split
  "$trtexec" "$@" --saveEngine="$plan.partial" ${{typed:+"$typed"}} ${{TRTEXEC_ARGS:-}} >"$plan.log" 2>&1 || status=$?
  if [ "$status" -eq 137 ] || [ "$status" -eq 9 ]; then
    echo "build_on_device: the build of $name was killed: memory ran out. Add swap on a disk (no ZRAM)," >&2
    echo "stop the desktop (sudo systemctl isolate multi-user.target), set" >&2
    echo "TRTEXEC_ARGS=--memPoolSize=workspace:512, and run this again: it goes on at $name." >&2
    exit 5
  fi
  if [ "$status" -ne 0 ] || [ ! -s "$plan.partial" ]; then
    tail -n 20 -- "$plan.log" >&2
    echo "build_on_device: trtexec could not build $name (status $status), see $plan.log" >&2
    exit 3
  fi
  mv -- "$plan.partial" "$plan"
  sha256sum -- "$plan" >"$plan.sha256"
  printf '%s\\n' "$key" >"$plan.key"
}}

"""

_TAIL = """\
printf '%s\\n' "$board" >{folder}/{board_file}
printf '%s\\n' {made_from} >{folder}/{made_from_file}
printf '%s %s\\n' "$mode" {layout} >{folder}/{mode_file}
echo "built. Nothing runs until every timestep bucket gave its golden outputs on this device:"
echo "  python3 diffcr_runtime.pyz check .        (or: diffcr validate . --level engine)"
"""


def write_script(
    artifact: Path,
    manifest: Manifest,
    default: EngineMode | None = None,
    settings: BuildSettings | None = None,
    layout: ProfileLayout = "pinned",
) -> Path:
    """Write ``build_on_device.sh`` into an artifact.

    Args:
        artifact: the artifact's folder.
        manifest: of it.
        default: the mode that it builds unless told otherwise; None for one that is always right,
            ``per_bucket``.
        settings: of the build.
        layout: of the profiles in the mode ``profiles``.
    """
    path = artifact / SCRIPT
    text = device_script(
        manifest, default or "per_bucket", settings or BuildSettings(), layout
    )
    atomic_write_bytes(path, text.encode())
    path.chmod(0o755)
    return path


def device_script(
    manifest: Manifest,
    default: EngineMode,
    settings: BuildSettings,
    layout: ProfileLayout = "pinned",
) -> str:
    """The text of ``build_on_device.sh``.

    Raises:
        UsageError: the artifact has no graphs for the default mode.
    """
    plans = _plans(manifest, layout)
    if default not in plans:
        plan_engines(manifest, default)  # says why not
    sums = "\n".join(
        f"{entry['sha256']}  {name}"
        for name, entry in sorted(manifest.files.items())
        if name.startswith("onnx/")
    )
    modes = "|".join(plans)
    head = _HEAD.format(
        modes=modes,
        default=default,
        sums=sums,
        folder=UNCHECKED,
        mode_file=MODE_FILE,
        model_file=f"/{BOARD_MODEL_FILE}",
    )
    cases = ["case $mode in"]
    for mode, plan in plans.items():
        cases += [f"  {mode})", *_calls(plan, manifest, settings), "    ;;"]
    cases += [
        "  *)",
        f'    echo "build_on_device: there is no mode $mode; name one of: {modes}" >&2',
        "    exit 2",
        "    ;;",
        "esac",
        "",
    ]
    tail = _TAIL.format(
        folder=UNCHECKED,
        layout=layout,
        made_from=made_from(manifest),
        board_file=BOARD_FILE,
        made_from_file=MADE_FROM_FILE,
        mode_file=MODE_FILE,
    )
    return head + "\n".join(cases) + tail


def _plans(manifest: Manifest, layout: ProfileLayout) -> dict[EngineMode, EnginePlan]:
    """The modes that the artifact has graphs for."""
    found: dict[EngineMode, EnginePlan] = {}
    for mode in ENGINE_MODES:
        try:
            found[mode] = plan_engines(manifest, mode, layout)
        except UsageError:
            continue  # exported without graphs for it
    return found


def _calls(plan: EnginePlan, manifest: Manifest, settings: BuildSettings) -> list[str]:
    return [_call(spec, manifest, settings) for spec in plan.engines]


def _call(spec: EngineSpec, manifest: Manifest, settings: BuildSettings) -> str:
    arguments: Sequence[str] = [
        argument
        for argument in trtexec_arguments(spec, settings, "")
        if not argument.startswith("--saveEngine=")
    ]
    key = job_key(graphs_hash(manifest), [list(arguments)])
    words = [shlex.quote(word) for word in (spec.name, key, unchecked_plan(spec))]
    lines = [f"    build {' '.join(words)}"]
    for argument in arguments:  # a line for the graph and one for each profile
        starts_line = argument.startswith(("--onnx=", "--profile="))
        lines += [f"      {shlex.quote(argument)}"] if starts_line else []
        lines[-1] += "" if starts_line else f" {shlex.quote(argument)}"
    return " \\\n".join(lines)
