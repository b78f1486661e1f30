# Makes .venv at the root of the repository with hf_focus and its extras, unless it is there and up to date.
# Sourced by quickstart.sh and test.sh: `setup tests` leaves $python set. `setup tests lowest` makes .venv-lowest, with the
# oldest transformers, torch and triton that pyproject.toml allows.
#   PYTHON       the interpreter to build with (default: python3), 3.10 or newer
#   TORCH_INDEX  a package index to take torch from, for example PyTorch's own index of CPU builds

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"

say() { printf '\n== %s\n' "$*"; }

setup() {
    local extras="$1" base="${PYTHON:-python3}" venv="$root/.venv${2:+-$2}" constraints="$root/scripts/constraints.txt"
    local stamp="$venv/.hf_focus" wanted oldest name
    local -a edits
    python="$venv/bin/python"
    wanted="$extras $(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum)"
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        say "Using the virtual environment ${venv##*/}"
        return
    fi
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or newer is needed; $base is $("$base" --version 2>&1). Set PYTHON to another one." >&2
        return 1
    }
    say "Creating the virtual environment ${venv##*/}"
    "$base" -m venv "$venv"
    if [ "${2:-}" = lowest ]; then
        # Their tokenizers, Hub client and numpy are as old as themselves
        edits=(-e '/^\(tokenizers\|huggingface_hub\)==/d' -e 's/^numpy==[^;]*/numpy<2.4/')
        for name in transformers torch triton; do
            oldest="$(sed -n "s/.*\"$name>=\([0-9.]*\).*/\1/p" "$root/pyproject.toml")"
            edits+=(-e "s/^$name==[^;]*/$name~=$oldest.0/")
        done
        sed "${edits[@]}" "$constraints" >"$venv/constraints.txt"
        constraints="$venv/constraints.txt"
    fi
    # A range would fetch the newest build for GPUs, gigabytes of it; the pinned one is enough on a CPU
    if command -v nvidia-smi >/dev/null 2>&1; then
        say "Installing torch for this machine's GPU"
    else
        say "Installing torch for a CPU${TORCH_INDEX:+ from $TORCH_INDEX} (TORCH_INDEX chooses where from)"
    fi
    # Without --no-compile, pip compiles every module of every package beforehand, which takes a minute
    "$python" -m pip install --disable-pip-version-check --no-compile ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        --constraint "$constraints" torch
    say "Installing hf_focus and what it needs"
    "$python" -m pip install --disable-pip-version-check --no-compile --constraint "$constraints" \
        --editable "$root[$extras]"
    printf '%s' "$wanted" >"$stamp"
}
