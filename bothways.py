import sys
from common.recipe import find
from train.loop import train
import dataclasses
r=find(sys.argv[1]); r=dataclasses.replace(r,train=dataclasses.replace(r.train,steps=int(sys.argv[3])))
print(train(r,sys.argv[2]))
