"""The config of a run: schema, presets and loader. Imports only pydantic and yaml."""

from proxykd_jax.config.load import dump_config, load_config, make_config
from proxykd_jax.config.method_section import Needs
from proxykd_jax.config.methods import Method
from proxykd_jax.config.schema import (
    AlignConfig,
    AxesConfig,
    BeamConfig,
    Config,
    CorpusConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    LoggingConfig,
    MeshConfig,
    ModelSection,
    OptimizerConfig,
    PreferenceConfig,
    SamplingConfig,
    ScoreConfig,
    SourceConfig,
    StopConfig,
    TrainingSection,
    WeightConfig,
    Work,
)
from proxykd_jax.config.section import Section

__all__ = [
    "AlignConfig",
    "AxesConfig",
    "BeamConfig",
    "Config",
    "CorpusConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "LoggingConfig",
    "MeshConfig",
    "Method",
    "ModelSection",
    "Needs",
    "OptimizerConfig",
    "PreferenceConfig",
    "SamplingConfig",
    "ScoreConfig",
    "Section",
    "SourceConfig",
    "StopConfig",
    "TrainingSection",
    "WeightConfig",
    "Work",
    "dump_config",
    "load_config",
    "make_config",
]
