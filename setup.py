from setuptools import find_packages, setup

setup(
    name="minisft",
    version="0.1.0",
    description="A from-scratch, pure-PyTorch engine that fine-tunes language models",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ imports as minisft.kernels: the registry has a package named "kernels" already.
    packages=find_packages(include=["minisft", "minisft.*"]) + ["minisft.kernels"],
    package_dir={"minisft.kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy",
        "tokenizers",
        "safetensors",
        "huggingface-hub>=1.0",
        "jinja2>=3.1.6",  # earlier versions have holes in the sandbox that chat templates run in
        "pyyaml",  # other trainers' configurations, for `minisft init`
        "tqdm",
        "tensorboard",
    ],
    extras_require={
        "parquet": ["pyarrow"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
        "mlflow": ["mlflow"],
        "test": ["pytest", "hypothesis", "ruff", "transformers", "peft", "bitsandbytes", "pyarrow"],
        "bench": ["transformers", "trl", "datasets", "matplotlib"],
    },
    entry_points={"console_scripts": ["minisft = minisft.__main__:main"]},
)
