"""Record adapters that AdapterHub's library saved and what its models give with them.

Run where `adapters==1.3.0` and its `transformers~=4.57.6` are installed, which cannot be beside those of this
package: `python -m tests.adapters.adapterhub.record`.
"""

from __future__ import annotations

import adapters
from safetensors.torch import save_file

from .cases import CASES, SOURCE, build, fill, output


def main() -> None:
    for name, config in CASES:
        model = build(name)
        adapters.init(model)
        model.add_adapter("task", config=f"{config}[reduction_factor=4]")
        model.set_active_adapters("task")
        model.double().eval()
        fill([(key, value) for key, value in model.named_parameters() if ".adapters.task." in key], 0.3)
        folder = SOURCE / f"{name}-{config}"
        folder.mkdir(parents=True, exist_ok=True)
        model.save_adapter(str(folder), "task", with_head=False, use_safetensors=True)
        save_file({"output": output(model)}, folder / "output.safetensors")


if __name__ == "__main__":
    main()
