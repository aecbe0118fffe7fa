"""A run's configuration: YAML file and `section.key=value` overrides in, one frozen Config out.

`yaml_io` reads, `schema` and `method` hold the settings, `rules` and `paths` the conditions between
them, `world` what depends on the number of ranks; `loading` joins them, `table` prints them.
"""

from megatron_vopd.config.loading import build_config, load_config
from megatron_vopd.config.schema import Config
from megatron_vopd.config.table import config_table_markdown, resolved_yaml
from megatron_vopd.config.world import layouts, smallest_world, world_problems
from megatron_vopd.errors import ConfigError, Problem

__all__ = [
    "Config",
    "ConfigError",
    "Problem",
    "build_config",
    "config_table_markdown",
    "layouts",
    "load_config",
    "resolved_yaml",
    "smallest_world",
    "world_problems",
]
