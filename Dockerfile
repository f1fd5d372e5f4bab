# luthier on a processor: docker build -t luthier . && docker run --rm -v "$PWD:/work" luthier train recipe.yaml
FROM python:3.12-slim
RUN useradd --create-home luthier && mkdir /work && chown luthier /work
COPY . /src
# Name an index with CPU builds of torch (--build-arg PIP_EXTRA_INDEX_URL=...) to spare the CUDA libraries, several gigabytes.
ARG PIP_EXTRA_INDEX_URL=""
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[peft,sweep]" \
    && rm -rf /src
USER luthier
WORKDIR /work
ENTRYPOINT ["luthier"]
CMD ["--help"]
