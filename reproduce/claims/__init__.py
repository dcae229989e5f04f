"""Each paper's headline claims as checks on results: one file per paper, criteria shared.

Verdicts: supported, not supported, inconclusive (the interval straddles the threshold, or runs are missing), not run.
At smoke scale a check is computed all the same, to exercise the code, but the verdict says nothing about the paper.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reproduce.claims.criteria import NOT_RUN, REFUTED, SUPPORTED, UNDECIDED, Claim
from reproduce.plugins import names
from reproduce.protocols import PAPERS, Profile, departure
from reproduce.results import Results

NO_VERDICT = "smoke scale: no verdict on the paper"


def claims(results: Results, profile: Profile) -> list[Claim]:
    """The claims that the entries are about, of every paper that has a file here, in the papers' order."""
    papers = {entry.paper for entry in results.entries} & set(names(Path(__file__).parent))
    return [scaled(claim, profile, departure(paper, profile)) for paper in PAPERS if paper in papers
            for claim in importlib.import_module(f"reproduce.claims.{paper}").claims(results)]


def write(found: Sequence[Claim], path: Path) -> None:
    """claims.json; NaN becomes null."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    path.write_text(json.dumps([plain(dataclasses.asdict(claim)) for claim in found], indent=1) + "\n",
                    encoding="utf-8")


def scaled(claim: Claim, profile: Profile, departure: str = "") -> Claim:
    """The claim with a verdict fit for the profile's scale. departure: what of the paper's protocol it replaces."""
    if profile.smoke:
        return dataclasses.replace(claim, verdict=claim.outcome if claim.outcome == NOT_RUN else NO_VERDICT,
                                   scale="smoke scale")
    departure = claim.scale or departure
    if departure:
        found = claim.outcome in (SUPPORTED, REFUTED)
        note = f"; {claim.outcome} with {departure}: no verdict on the paper"
        return dataclasses.replace(claim, verdict=UNDECIDED if found else claim.outcome, scale=departure,
                                   evidence=claim.evidence + note if found else claim.evidence)
    if profile.shortened:
        return dataclasses.replace(claim, scale="shortened protocol")
    return dataclasses.replace(claim, scale="exact protocol")
