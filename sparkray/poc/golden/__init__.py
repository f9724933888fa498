"""Comparing this implementation with recorded values of the original: `sparkray poc check FILE`."""

from sparkray.poc.golden.check import check_file, check_sections
from sparkray.poc.golden.report import SectionReport

__all__ = ["SectionReport", "check_file", "check_sections"]
