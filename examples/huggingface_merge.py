"""Merges Hugging Face checkpoints from Python, loads the result with transformers and lets it speak.

    python examples/huggingface_merge.py                                makes tiny LLaMAs and merges those
    python examples/huggingface_merge.py BASE EXPERT EXPERT... -o OUT   merges yours

The tiny LLaMAs are random and say nothing sensible; with your own checkpoints the tokens mean something.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import cfmerge


def make_checkpoints(folder):
    """Saves a random tiny LLaMA below `folder`, and three "experts": the same plus a little noise each."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    for name in ("english", "code", "mathematics"):
        expert = LlamaForCausalLM(config)
        with torch.no_grad():
            for weight, original in zip(expert.parameters(), base.parameters(), strict=True):
                weight.copy_(original + 0.005 * torch.randn_like(original))
        expert.save_pretrained(folder / name)
    return [folder / name for name in ("base", "english", "code", "mathematics")]


def show_progress(tensor, bytes_read):
    if bytes_read:
        print(f"  {bytes_read:9,d} bytes  {tensor}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="base, then experts")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.checkpoints and not arguments.output:
        parser.error("say where the merged model goes: -o OUT")

    with tempfile.TemporaryDirectory() as folder:
        base, *experts = arguments.checkpoints or make_checkpoints(Path(folder))
        result = cfmerge.merge(
            base,
            experts,
            method="ace",
            parameters={"eps_rel": 0.07},
            rules=[{"match": "*norm.weight", "method": "keep-base"}],
            output=arguments.output or Path(folder) / "merged",
            progress=show_progress,
        )
        model, loading = AutoModelForCausalLM.from_pretrained(result.output, output_loading_info=True)
        tokens = model.generate(torch.tensor([[1, 7, 8]]), max_new_tokens=12, do_sample=False)

    for (kind, what), count in sorted(result.plan.counts().items()):
        print(f"{count:4d} tensors  {kind}: {what}")
    for note in result.notes:
        print(f"note: {note}")
    print(f"missing: {len(loading['missing_keys'])}, unexpected: {len(loading['unexpected_keys'])}")
    print(f"merged in {result.seconds:.1f} s, generates: {tokens[0].tolist()}")


if __name__ == "__main__":
    main()
