# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest finds in its file system when it is a cluster node: corosync.conf, /etc/hosts, a first CIB."""

from __future__ import annotations

from collections.abc import Mapping

from tests.rig.cpio import Entry, regular

_TOTEM = """\
totem {
    version: 2
    cluster_name: rig
    transport: knet
    crypto_cipher: none
    crypto_hash: none
    token: 3000
}
logging {
    to_logfile: yes
    logfile: /var/log/corosync/corosync.log
    to_syslog: no
    timestamp: on
}
"""
_NODE = """\
    node {{
        name: {name}
        nodeid: {number}
        ring0_addr: {address}
    }}
"""
_CIB = """\
<cib validate-with="pacemaker-3.9" admin_epoch="0" epoch="1" num_updates="0">
  <configuration>
    <crm_config>
      <cluster_property_set id="cib-bootstrap-options">
        <nvpair id="cib-bootstrap-options-stonith-timeout" name="stonith-timeout" value="180s"/>
      </cluster_property_set>
    </crm_config>
    <nodes/>
    <resources>{resources}</resources>
    <constraints/>
    <op_defaults>
      <meta_attributes id="op-options">
        <nvpair id="op-options-timeout" name="timeout" value="120s"/>
      </meta_attributes>
    </op_defaults>
  </configuration>
  <status/>
</cib>
"""
CIB_PATH = "/var/lib/pacemaker/cib/cib.xml"
"""It must belong to hacluster."""


def cluster_files(nodes: Mapping[str, str], resources: str = "") -> dict[str, Entry]:
    """The files of every node.

    Args:
        nodes: name to address.
        resources: what the cluster's first configuration holds, as XML. Its time-outs are long: a start that
            runs out of time bans a device from its node for good, and a guest under TCG may be slow.
    """
    hosts = "".join(f"{address} {name}\n" for name, address in nodes.items())
    return {
        "/etc/corosync/corosync.conf": regular(_corosync_conf(nodes).encode()),
        "/etc/hosts": regular(f"127.0.0.1 localhost\n{hosts}".encode()),
        CIB_PATH: regular(_CIB.format(resources=resources).encode()),
    }


def _corosync_conf(nodes: Mapping[str, str]) -> str:
    listed = "".join(
        _NODE.format(name=name, number=number, address=address)
        for number, (name, address) in enumerate(nodes.items(), start=1)
    )
    two = "    two_node: 1\n" if len(nodes) == 2 else ""
    return f"{_TOTEM}quorum {{\n    provider: corosync_votequorum\n{two}}}\nnodelist {{\n{listed}}}\n"
