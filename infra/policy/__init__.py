"""The policy pack: rules that every preview and every update of a stack is checked by."""
