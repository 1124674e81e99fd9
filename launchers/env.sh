# The environment of every job, sourced by every launcher (bash). What is set already stays as it is.
#
#   PROCESSES  processes of the job on this host: one for each GPU, or one where there is none
#   LDM_LOCAL  a folder on this host's own disk that outlives the job

# Signals that the elastic agent of torchrun and `accelerate launch` hands on. Torch's own, and SIGUSR1: not in this list,
# it kills the agent alone and leaves its workers behind (torch 2.15).
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}

# Seconds between a signal and SIGKILL, for a last save. Torch gives 30. Launchers without an agent take the same number.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

# What compilers leave behind. Their default is the home directory: on a cluster a network disk, where all hosts wait
# for one lock, and for ever after its owner is killed.
LDM_LOCAL=${LDM_LOCAL:-/tmp/ldm_scale-$(id -u)}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$LDM_LOCAL/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$LDM_LOCAL/inductor}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$LDM_LOCAL/extensions}

# NCCL is silent by default, whatever fails. By torch's default an error in a collective ends the process. Interfaces,
# adapters and algorithms are the site's to set, or NCCL's to find.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# 4.096 us x 2^22 = 17 s for an answer, seven times: a switch of InfiniBand may start anew within two minutes. Not the one
# that leads to MASTER_ADDR: who is silent there for 40 s is taken for lost (ldm_scale/training/watchdog.py).
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}

if [[ -z ${PROCESSES:-} ]]; then
    PROCESSES=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
    PROCESSES=$((PROCESSES > 0 ? PROCESSES : 1))
fi

# The cores of this host, shared out. By default torchrun and `accelerate launch` give a process one thread.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    LDM_CORES=$(nproc)
    export OMP_NUM_THREADS=$((LDM_CORES > PROCESSES ? LDM_CORES / PROCESSES : 1))
fi
