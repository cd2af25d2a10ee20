from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ostinato
from ostinato.tasks.text import Text
from ostinato.training.fit import fit
from ostinato.training.history import History

SCRIPT = """
import sys
import torch
import ostinato
from ostinato.tasks.text import Text
from ostinato.training.fit import fit

torch.set_num_threads(1)
torch.manual_seed(0)
model = ostinato.LanguageModel(d_model=8, plan="min_gru", depth=1)
text = Text(files=(sys.argv[2],), window=16, test_rows=4)
options = dict(steps=6, batch_size=4, gradient_accumulation=2, directory=sys.argv[1], device="cpu", progress=False)
fit(model, text, callbacks=[lambda report: report.step == 3], **options)
fit(model, text, resume=True, **options)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_follow_the_curve_of_one(text: Text, tmp_path: Path) -> None:
    """Data parallel, with accumulation, carried states, and a resume half-way: the losses are those of one process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(tmp_path / "run"), text.files[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two = History.load(tmp_path / "run" / "history.json")
    torch.manual_seed(0)
    model = ostinato.LanguageModel(d_model=8, plan="min_gru", depth=1)
    one = fit(model, text, steps=6, batch_size=4, device="cpu", progress=False)
    assert len(one.losses) == 6 and two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.gradient_norms == pytest.approx(one.gradient_norms, rel=1e-4)
