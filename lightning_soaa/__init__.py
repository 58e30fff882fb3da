"""SOAA: a PyTorch optimizer without a learning rate, and its PyTorch Lightning front door."""

from lightning_soaa.advice import TrustRegionWarning as TrustRegionWarning
from lightning_soaa.averaging import get_polynomial_avg_fn as get_polynomial_avg_fn
from lightning_soaa.fisher import DiagonalFisher as DiagonalFisher
from lightning_soaa.kronecker import KroneckerFisher as KroneckerFisher
from lightning_soaa.module import SOAAMixin as SOAAMixin
from lightning_soaa.monitor import TrustRegionMonitor as TrustRegionMonitor
from lightning_soaa.optimizer import SOAA as SOAA
from lightning_soaa.radius import FixedRadius as FixedRadius
from lightning_soaa.radius import PublishedRadius as PublishedRadius
from lightning_soaa.ratio import RatioRadius as RatioRadius
from lightning_soaa.report import StepReport as StepReport
from lightning_soaa.report_callback import TrustRegionReport as TrustRegionReport

__version__ = "0.1.0"
