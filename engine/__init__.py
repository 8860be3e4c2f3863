"""Time and tokens: the scheduler, the model runner and the worker process around them."""
