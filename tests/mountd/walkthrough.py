"""The XML of the original HLFS's walkthrough with libvirt, as its users have it."""

POOL = """<pool type="hlfs">
	<name>local:///tmp/testenv</name>
	<source>
	<name>local:///tmp/testenv</name>
	<host name='localhost' port='7000'/>
	</source>
</pool>
"""

VOLUME = """<volume>
<name>testfs</name>
<key>hlfs/testfs</key>
<source>
</source>
<capacity unit='bytes'>1000000000</capacity>
<allocation unit='bytes'>1000000000</allocation>
<target>
<path>hlfs:local:///tmp/testenv/testfs</path>
<format type='unknown'/>
<permissions>
<mode>00</mode>
<owner>0</owner>
<group>0</group>
</permissions>
</target>
</volume>
"""

DOMAIN = """<domain type='qemu'>
<name>testvm</name>
<memory>1048576</memory>
<os>
<type arch='x86_64'>hvm</type>
</os>
<devices>
<disk type='network'>
<source protocol="hlfs" name="local:///tmp/testenv/testfs"/>
<target dev='hda' bus='ide'/>
</disk>
<graphics type='vnc' port='-1' autoport='yes'/>
</devices>
</domain>
"""

SNAPSHOT_DOMAIN = DOMAIN.replace("/testfs", "/testfs%snapshot1")
