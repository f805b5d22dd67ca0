"""Images for fine-tuning: folders, timm's and torchvision's data sets on disk, and scikit-learn's digits.

What a sample looks like depends on (seed, epoch, index) alone: its augmentation draws from generators seeded
with these three. So a run can stop and go on anywhere, and the number of loader processes or devices changes
nothing.

For: from the settings `data` to batches. Not for: models, of which only the preprocessing is asked, nor for
downloading. From the ground up: seeds · reading · datasets · multilabel · opening · preprocessing ·
samples · loaders.
"""
