import sys, asyncio, json, pytest
from tests.serving import test_property as tp, played_server as ps
from tests.serving.test_faults import alone
import tests.serving.played_server as ps
ps.WAIT_SECONDS=25
orig=ps.PlayedServer.idle
async def idle(self):
    try: await orig(self)
    except AssertionError:
        print("LEASES", dict(self.service.store._leases), "JOBS", list(self.service._jobs), flush=True)
        for api in self.apis:
            for d,a in api.front.artifacts.items():
                if a.users or a.leased: print("FRONT", self.apis.index(api), a.name, a.users, a.leased, a.linger, a.state, a.lock.locked(), api.front.links.epoch, a.epoch, api.front.connected, flush=True)
        print("SESS", [(h.leases,h.wanted) for h in self.service._sessions.values()], flush=True)
        for t in asyncio.all_tasks(): print("TASK", str(t)[:200], flush=True)
        raise
ps.PlayedServer.idle=idle
otell=tp.tell
def tell(happens, config, right):
    print("STORY", json.dumps(happens), flush=True)
    otell(happens, config, right)
tp.tell=tell
from tests.serving.test_property import test_every_answer_is_the_artifacts_own_at_length as t1
def test_x(tmp_path_factory, alone):
    t1(tmp_path_factory=tmp_path_factory, alone=alone)
