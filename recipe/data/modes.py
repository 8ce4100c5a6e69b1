"""The two modes of training data, and which one a run has."""

from recipe.arguments import PretrainArguments
from recipe.data.batches import TrainingData
from recipe.data.cached import CachedData
from recipe.data.preprocessor import Preprocessor
from recipe.data.streamed import StreamedData


def open_data(
    args: PretrainArguments, preprocessor: Preprocessor, process_index: int = 0, verifies: bool = True
) -> TrainingData:
    """Open the corpora; in cached mode, make what is not there yet of their token stores, and verify what is there.

    Raises:
        UserError: a corpus that cannot be read, or is too small for the run and what it holds out; a full disk.
    """
    if args.streaming:
        return StreamedData(args, preprocessor)
    return CachedData(args, preprocessor, process_index, verifies)
