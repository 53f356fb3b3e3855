"""The report in a browser: no scrolling sideways at any width, and nothing serious for an accessibility checker.

Needs chromium, node and npm on PATH; npm fetches the checker. With `REPORT_IMAGES=docs/images` the screenshots of the
documentation are made anew.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from prefect_biomed.analysis import Experiment, RunRecord, inventory, write_report

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
MISSING = [name for name, found in (("chromium", BROWSER), ("npm", shutil.which("npm"))) if not found]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.endurance,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {', '.join(MISSING)}"),
]
PACKAGES = ("axe-core@4.14.1", "puppeteer-core@25.16.0")
WIDTHS = (1280, 400)
SCRIPT = """
const puppeteer = require("puppeteer-core"), axe = require("axe-core"), fs = require("fs");
(async () => {
  const [page, browser, folder, ...widths] = process.argv.slice(2);
  const chromium = await puppeteer.launch({executablePath: browser, args: ["--no-sandbox"], protocolTimeout: 300000});
  const tab = await chromium.newPage();
  const requests = [];
  tab.on("request", (request) => requests.push(request.url().slice(0, 60)));
  const found = {};
  for (const width of widths) {
    await tab.setViewport({width: Number(width), height: 900});
    await tab.goto("file://" + page);
    const wide = await tab.evaluate(() => document.documentElement.scrollWidth);
    await tab.screenshot({path: `${folder}/report-${width}.png`, fullPage: true});
    await tab.evaluate(axe.source);
    const result = await tab.evaluate(() => axe.run());
    found[width] = {
      wide,
      passes: result.passes.length,
      violations: result.violations.map(({id, impact, nodes}) => ({id, impact, first: nodes[0].html.slice(0, 200)})),
    };
  }
  found.requests = requests;
  await chromium.close();
  fs.writeFileSync(`${folder}/found.json`, JSON.stringify(found));
})().catch((error) => { console.error(error); process.exit(1); });
"""


@pytest.fixture
def page(tmp_path: Path, volume: Path) -> Path:
    """Report of the sixth week of a noisy pipeline whose library was changed in the fourth."""
    experiment = Experiment(tmp_path / "experiment")
    image = nibabel.load(volume)
    voxels = np.asarray(image.dataobj, dtype=np.float64)
    mask = voxels > voxels.mean()
    generator = np.random.default_rng(6)
    began = datetime(2026, 3, 2, 3, 0, tzinfo=UTC)
    series = ""
    for week in range(6):
        series = f"week-{week + 1}"
        records = []
        for repetition in range(1, 6):
            folder = experiment.output_dir(series, "SkullStrip/1.0") / f"r{repetition}"
            folder.mkdir(parents=True)
            shift = 3e-6 if week >= 3 else 0.0
            strength = 10.0 ** -(6.0 - 2.0 * np.abs(np.linspace(-1, 1, voxels.shape[0]))[:, None, None])
            brain = np.where(mask, voxels * (1 + shift + strength * generator.standard_normal(voxels.shape)), 0.0)
            content = nibabel.Nifti1Image(brain, image.affine).to_bytes()
            (folder / "brain.nii.gz").write_bytes(gzip.compress(content, mtime=repetition))
            (folder / "mask.nii.gz").write_bytes(
                gzip.compress(nibabel.Nifti1Image(mask.astype(np.uint8), image.affine).to_bytes(), mtime=repetition)
            )
            rows = [("brain", float(brain[mask].mean())), ("background", float(voxels[~mask].mean()))]
            (folder / "volumes.csv").write_text(
                "region,mean\n" + "".join(f"{name},{value!r}\n" for name, value in rows)
            )
            succeeded = (week, repetition) != (5, 3)
            records.append(
                RunRecord(
                    series=series,
                    began=began + week * timedelta(days=7),
                    pipeline="SkullStrip/1.0",
                    repetition=repetition,
                    execution=f"workflow-{week}a{repetition}",
                    status="Finished" if succeeded else "ExecutionFailed",
                    succeeded=succeeded,
                    message="" if succeeded else "ExecutionFailed job 0: the tool exited with status 3, exit code 3",
                    folder=folder.relative_to(experiment.folder).as_posix(),
                    digests=inventory(folder),
                    started=began + week * timedelta(days=7),
                    recorded=began + week * timedelta(days=7, hours=1),
                    url="https://vip.creatis.insa-lyon.fr",
                )
            )
        experiment.append(records)
    report = experiment.report(series, title="Weekly repeatability of SkullStrip")
    runs = {"SkullStrip/1.0": experiment.runs(r for r in experiment.records() if r.series == series)}
    return write_report(report, tmp_path / "report", runs=runs).html


def test_no_scrolling_sideways_and_nothing_serious(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "browser"
    folder.mkdir()
    (folder / "check.cjs").write_text(SCRIPT)
    (folder / "package.json").write_text('{"private": true}')
    installed = subprocess.run(
        ["npm", "install", "--no-fund", "--no-audit", *PACKAGES],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr
    widths = [str(width) for width in WIDTHS]
    checked = subprocess.run(
        ["node", "check.cjs", str(page), BROWSER, str(folder), *widths],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    for width in WIDTHS:
        result = found[str(width)]
        assert result["wide"] <= width
        assert result["passes"] > 20
        assert result["violations"] == []
    assert {url.split(":", 1)[0] for url in found["requests"]} <= {"file", "data"}
    images = os.environ.get("REPORT_IMAGES")
    if images:
        for width in WIDTHS:
            with Image.open(folder / f"report-{width}.png") as shot:
                width_shown = 800 if width > 800 else width
                small = shot.convert("RGB").resize(
                    (width_shown, shot.height * width_shown // shot.width), Image.Resampling.LANCZOS
                )
                small.quantize(256, Image.Quantize.MAXCOVERAGE).save(
                    Path(images, f"repeatability-report-{width}.png"), optimize=True
                )
