# Trains, evaluates and benchmarks in a container:
#
#     docker build -t segfit .
#     docker run --rm segfit                     # what `make demo` trains
#     docker run --rm --gpus all --shm-size 8g -v $PWD/my_data:/segfit/my_data -v $PWD/outputs:/segfit/outputs \
#         segfit train.py data=folder data.root=my_data data.num_classes=3
#
# torch brings its CUDA libraries; the host needs NVIDIA's driver and container toolkit for --gpus. Data workers hand
# samples over in shared memory, of which a container has 64 MB without --shm-size.
FROM python:3.12-slim

# torch.compile calls a C++ compiler
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /segfit
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -r requirements.txt
COPY conf conf
COPY train.py evaluate.py benchmark.py ./

ENTRYPOINT ["python"]
CMD ["train.py", "experiment=demo"]
