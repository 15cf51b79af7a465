"""gpt2_xla: pretrain GPT-2 style models on TPUs, GPUs and CPUs from one model, loop and loader."""
