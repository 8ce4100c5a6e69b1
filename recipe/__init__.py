"""Pretrain RoBERTa from scratch with the Hugging Face libraries."""
