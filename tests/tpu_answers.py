"""What the TPU compiler says of a program that does not fit."""

TOO_LARGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 34.28G of 15.48G hbm. Exceeded hbm capacity by 18.80G.

  Largest program allocations in hbm:

  1. Size: 6.10G
     Operator: op_name="xla__cross_replica_sum" source_file="x.py" source_line=450 source_end_line=450
     Shape: f32[400000,4096]{1,0:T(8,128)}
     Unpadded size: 6.10G
     Allocation type: HLO temp
     ==========================

  2. Size: 256.00M
     Shape: f32[4096,16384]{1,0:T(8,128)}
     Unpadded size: 256.00M
"""
