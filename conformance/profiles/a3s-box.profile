# a3s-box: NAME | WORDS of the failure | REASON. Its refusals are wishes of their own (src/wishes/bad_configs.rs), with
# their texts; what stands here is where it differs from what other runtimes do.
