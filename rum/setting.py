"""Published settings: what a run reproduces, and where paper and released code disagree."""

from dataclasses import dataclass, field

from rum.checks import check_at_least, check_choice

SOURCES = ("paper", "code", "reconstruction")


@dataclass(kw_only=True)
class ProfileConfig:
    """One option for each difference between the released code and the printed paper.

    `profile=reference` sets what was released at submission time, `profile=paper` what is
    printed; where the paper is silent both are the released code's. The settings in
    `search_spaces/experiment/` and `search_spaces/training/` refer to these by interpolation, so
    each can also be set alone. A table of them, with sources, is in docs/settings.md.
    """

    name: str = "reference"
    """"reference" or "paper"; recorded with the run."""
    recall_optimizer: str = "adam"
    """The paper writes RMSProp, every version of the code uses Adam."""
    rmsprop: str = "rmsprop_tensorflow"
    """What "RMSProp" means; torch's own is "rmsprop"."""
    character_lm_schedule: str = "drop"
    """Released: x 0.1 after 181 of 200 epochs; the paper's Table 6 is "table6"."""
    character_lm_epochs: int = 200
    """Of the Fast-Slow models; the paper has 360."""
    rum_dropout: float = 0.0
    """Of RUM and 2xRUM on Penn Treebank; Table 5 lists 0.35, the code has none."""
    loss_over_time: str = "sum"
    """Before clipping, on Penn Treebank; the paper is silent."""
    babi_epochs: int = 20
    """Intervals of 200 updates: 4,000 updates released; the paper's 20 passes are 5,625."""
    layer_norm_gate: str = "post_sigmoid"
    """Where the update gate is normalised; the paper is silent."""
    embedding_bias: bool = True
    """In the paper and at submission; dropped from the code in June 2018."""
    goru_zero_last_unit: bool = True
    """A slip of the released GORU and EUNN that makes their matrix singular."""


@dataclass(kw_only=True)
class SettingConfig:
    """Which published row or curve the options are a setting of; set by `experiment=`."""

    name: str | None = None
    """Its file below `search_spaces/experiment/`; null where the options are one's own."""
    version: int = 1
    """Grows when the file's options change."""
    source: str = "reconstruction"
    """Where its options come from: "paper", "code", or "reconstruction" where neither says."""
    published: float | None = None
    """The published number; null where there is none (a curve)."""
    metric: str | None = None
    """The metric of `published`, for example `test/bits_per_character`."""
    rows: dict[str, float] = field(default_factory=dict)
    """The published numbers of a column of a table, where `published` is that of row `key`."""
    key: str | None = None
    """A key of `rows`."""
    row: str | None = None
    """What it is called there."""
    changes: list[str] = field(default_factory=list)
    """Options that were given another value; set by the pipelines."""

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        check_at_least("setting.version", self.version, 1)
        check_choice("setting.source", self.source, SOURCES)

    def lines(self) -> list[str]:
        """What a user should know of it before the run; none without a setting."""
        if self.name is None:
            return []
        lines = [f"  setting {self.name} (version {self.version}), from: {self.source}"]
        if self.changes:
            lines.append(f"  changed: {', '.join(self.changes)}")
        if self.published is not None:
            lines.append(f"  published for {self.row}: {self.metric} {self.published:g}")
        return lines


@dataclass(kw_only=True)
class PublishedConfig:
    """The two sections that say what a run stands for; part of every pipeline's options."""

    profile: ProfileConfig = field(default_factory=ProfileConfig)
    setting: SettingConfig = field(default_factory=SettingConfig)

    def published_tags(self) -> dict[str, str]:
        """Tags of the run; empty values are left out."""
        tags = {"rum.profile": self.profile.name}
        if self.setting.name is not None:
            tags["rum.experiment"] = self.setting.name
            tags["rum.experiment_version"] = str(self.setting.version)
            tags["rum.source"] = self.setting.source
            if self.setting.changes:
                tags["rum.experiment_changes"] = ", ".join(self.setting.changes)
        return tags
