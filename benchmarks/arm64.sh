#!/usr/bin/env bash
# Do bundles answer on 64-bit ARM what they answer here? `sudo benchmarks/arm64.sh [CACHE]`, on an x86-64 host.
#
# What it proves: the registry's own aarch64 wheels (onnxruntime, numpy, tokenizers, pillow) and the project's wheel,
# built from this checkout, run on Debian 12 for arm64 under QEMU's user-mode emulation. The golden checkpoints in fp32,
# int8, q4 and mixed, and the embedded nano, are asked the same there as on the host, and a table says how many greedy
# ids are equal and how far the logits lie apart; where an id is another, both candidates follow. In fp32 all should be.
# Eight-bit layers make a step of the last bit that two processors round otherwise, so there the measure is what pixels
# that are a millionth off do on the host alone. Exit status 1: an id or the logits are off by more than that, or
# `verify` or `doctor` fails there. What it does not prove: anything about speed or a GPU; and QEMU is not silicon.
#
# What it needs: root (for mounts of its own that nothing else sees, and chroot; binfmt_misc is neither needed nor
# touched), Debian or Ubuntu with
#   apt-get install qemu-user-static debootstrap debian-archive-keyring python3-venv
# Python 3.11 or later, 2.1 GB of disk, the network, and less than half an hour. CACHE (~/.cache/molmo-edge-arm64) keeps
# the downloads; the checkout is only read.
#   CPUS     processors for QEMU, see below          PYTHON   the host's interpreter (python3)
#   THREADS  of onnxruntime, on both sides (2)       MIRROR   of Debian
#   TORCH_INDEX  where a PyTorch without CUDA is (one golden checkpoint is a pickle); else pip looks where it always does
set -euo pipefail

# What each is there for is which instructions onnxruntime finds for products of 8-bit integers; which ones it ran was
# looked up in QEMU's log of instructions (-d in_asm):
#   cortex-a72  none but plain NEON (Raspberry Pi 4)
#   cortex-a76  udot and sdot (Raspberry Pi 5; near Jetson Orin's Cortex-A78AE, which QEMU has no model of)
#   max         smmla, and ummla of SVE (Jetson Thor, Graviton 3 and later); SME is off, few machines have it
CPUS=${CPUS:-cortex-a72 cortex-a76 max,sme=off}
MIRROR=${MIRROR:-} # empty: debootstrap's own choice
TORCH_INDEX=${TORCH_INDEX:-}
THREADS=${THREADS:-2}

checkout=$(cd "$(dirname "$0")/.." && pwd)
cache=${1:-${HOME:?}/.cache/molmo-edge-arm64}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
root=$cache/root
work=$root/molmo # seen as /molmo from inside
export PIP_CACHE_DIR=$cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
unset PYTHONPATH

step() { # step TITLE COMMAND...
    local title=$1 began=$SECONDS
    shift
    echo "==== $title"
    "$@"
    echo "==== $title: $((SECONDS - began)) s"
}

tools() {
    [[ $(uname -m) == x86_64 ]] || { echo "arm64.sh: this host is $(uname -m), not x86_64" >&2; return 1; }
    [[ $EUID == 0 ]] || { echo "arm64.sh: must be run as root, for chroot" >&2; return 1; }
    [[ $CPUS == *[![:space:]]* ]] || { echo "arm64.sh: CPUS names no processor" >&2; return 1; }
    local tool
    for tool in qemu-aarch64-static debootstrap unshare; do
        command -v "$tool" >/dev/null || { echo "arm64.sh: $tool is missing, see the head of this file" >&2; return 1; }
    done
    qemu-aarch64-static --version | head -1
}

# debootstrap's second stage would run arm64 programs that start each other, for which the kernel must know QEMU.
# Nothing here starts another program, so the packages are only unpacked; their maintainers' scripts never run.
debian() {
    if [[ ! -e $root/.ready ]]; then
        rm -rf "$root"
        debootstrap --foreign --arch=arm64 --variant=minbase --include=python3 bookworm "$root" ${MIRROR:+"$MIRROR"} \
            >"$cache/debian.log"
        local package
        for package in "$root"/var/cache/apt/archives/*.deb; do
            # Without touching what the first stage laid out: /lib is a link there, a directory in the packages.
            dpkg-deb --fsys-tarfile "$package" | tar -xpf - --skip-old-files -C "$root"
        done
        # In a container the first stage makes proc a link to /proc, and a mount on it would land on the host's own.
        [[ ! -L $root/proc ]] || rm "$root/proc"
        mkdir -p "$root"/{proc,sys,dev}
        touch "$root/.ready"
    fi
    cp "$(command -v qemu-aarch64-static)" "$root/usr/bin/"
    cat "$root/etc/debian_version"
}

wheel() { # from a copy, so that neither build/ nor *.egg-info appear in the checkout, nor stale ones are packed
    rm -rf "$cache/source" "$cache/wheel"
    mkdir "$cache/source"
    (cd "$checkout" && tar -cf - --exclude=__pycache__ \
        molmo_edge export quantize runtimes pyproject.toml README.md MANIFEST.in LICENSE NOTICE) |
        tar -xf - -C "$cache/source"
    [[ -x $cache/venv/bin/pip ]] || "${PYTHON:-python3}" -m venv "$cache/venv"
    "$cache/venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$cache/wheel" "$cache/source"
    ls "$cache/wheel"
}

host() {
    local built=("$cache"/wheel/*.whl)
    "$cache/venv/bin/pip" install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "${built[0]}[export,torch]"
    "$cache/venv/bin/pip" install --quiet --force-reinstall --no-deps "${built[0]}" # the version may not have changed
    "$cache/venv/bin/pip" list 2>/dev/null | grep -E '^(molmo|numpy|onnx|pillow|tokenizers|torch)'
}

# The host's pip fetches what arm64 needs, in the host's versions: both sides must differ in the processor alone.
guest() {
    local built=("$cache"/wheel/*.whl) platforms=(--platform manylinux2014_aarch64) minor
    for minor in $(seq 17 36); do # Debian 12 has glibc 2.36, and pip takes each of these at its word
        platforms+=(--platform "manylinux_2_${minor}_aarch64")
    done
    "$cache/venv/bin/pip" freeze | grep -v '^molmo-edge' >"$cache/versions.txt"
    rm -rf "$work"
    mkdir -p "$work/images"
    "$cache/venv/bin/pip" install --quiet --target "$work/site" --only-binary=:all: --python-version 311 \
        "${platforms[@]}" --constraint "$cache/versions.txt" "${built[0]}"
    find "$work/site" -name '*.so*' -exec od -An -tx2 -j18 -N2 {} \; | sort | uniq -c | # e_machine of each
        awk '{ print $1, "shared objects", ($2 == "00b7" ? "for aarch64" : "for ANOTHER machine"); bad += $2 != "00b7" }
            END { exit bad }'
    cp "$checkout"/tests/golden/*.png "$checkout/examples/coffee.jpg" "$work/images/"
    cp "$checkout/benchmarks/arm64_answers.py" "$work/"
}

# What the emulated processor would find in /proc/cpuinfo. QEMU's user mode shows the host's, of which onnxruntime
# understands nothing and, warning of it, half of its detection is skipped. The flags are what QEMU gives each model.
cpuinfo() { # cpuinfo CPU
    local part features='fp asimd aes pmull sha1 sha2 crc32 cpuid' n
    local a76=' atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp'
    case $1 in
        cortex-a72*) part=0xd08 ;;
        cortex-a76*) part=0xd0b features+=$a76 ;;
        *) part=0xd4f features+="$a76 sve sve2 svei8mm svebf16 i8mm bf16" ;;
    esac
    for n in $(seq 0 $(($(nproc) - 1))); do
        printf 'processor\t: %d\nBogoMIPS\t: 50.00\nFeatures\t: %s\nCPU implementer\t: 0x41\n' "$n" "$features"
        printf 'CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: %s\nCPU revision\t: 0\n\n' "$part"
    done
}

# The mounts live in a namespace of their own and end with the command.
emulated() { # emulated CPU ARGUMENTS-OF-PYTHON...
    local cpu=$1
    shift
    cpuinfo "$cpu" >"$cache/cpuinfo"
    # shellcheck disable=SC2016
    unshare --mount --propagation private bash -euc '
        root=$1 cpuinfo=$2 cpu=$3
        shift 3
        for folder in proc sys dev; do mount --bind "/$folder" "$root/$folder"; done
        mount --bind "$cpuinfo" "$root/proc/cpuinfo"
        cd /
        exec env -i PATH=/usr/bin HOME=/molmo LANG=C.UTF-8 PYTHONPATH=/molmo/site MOLMO_EDGE_CACHE=/molmo/cache \
            "$(command -v chroot)" "$root" /usr/bin/qemu-aarch64-static -cpu "$cpu" /usr/bin/python3 "$@"
    ' emulated "$root" "$cache/cpuinfo" "$cpu" "$@"
}

here() { "$cache/venv/bin/python" "$work/arm64_answers.py" "$@"; }

nudged() {
    local seed
    for seed in 1 2 3 4 5 6; do
        here ask "$work" "nudged-$seed" --follow x86-64 --nudge "$seed" --threads "$THREADS" 2>/dev/null
    done
}

on() { # on CPU: what fails on one processor is noted, and the next one still runs
    {
        emulated "$1" -m molmo_edge.cli doctor --json &&
            emulated "$1" -m molmo_edge.cli verify --threads "$THREADS" &&
            emulated "$1" -m molmo_edge.cli verify --threads "$THREADS" /molmo/bundles/molmoe-mixed
    } || failed+=("$1: doctor or verify")
    emulated "$1" /molmo/arm64_answers.py ask /molmo "$1" --follow x86-64 --threads "$THREADS" || failed+=("$1: ask")
}

step "tools" tools
step "Debian for arm64" debian
step "the project's wheel" wheel
step "packages for this host" host
step "packages for arm64" guest
step "bundles, exported here" here export "$checkout/tests/golden" "$work"
step "answers here" here ask "$work" x86-64 --threads "$THREADS"
step "answers here, to photos a rounding off" nudged
failed=()
for cpu in $CPUS; do
    step "$cpu" on "$cpu"
done
for cpu in $CPUS; do
    echo
    [[ -e $work/answers/$cpu/answers.json ]] || continue
    here compare "$work" x86-64 "$cpu" || failed+=("$cpu: answers")
done
echo
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all answers hold on aarch64, in $SECONDS s"
