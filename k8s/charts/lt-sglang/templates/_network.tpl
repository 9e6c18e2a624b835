{{- define "lt.prometheusPeer" -}}
namespaceSelector:
  matchLabels:
    {{- toYaml .Values.networkPolicy.prometheusNamespaceLabels | nindent 4 }}
podSelector:
  matchLabels:
    {{- toYaml .Values.networkPolicy.prometheusPodLabels | nindent 4 }}
{{- end }}

{{- define "lt.dns" -}}
to:
  - namespaceSelector:
      matchLabels:
        kubernetes.io/metadata.name: kube-system
  # NodeLocal DNSCache listens on the node itself.
  - ipBlock: {cidr: 169.254.20.10/32}
  {{- with .Values.networkPolicy.dnsPeers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - {port: 53, protocol: UDP}
  - {port: 53, protocol: TCP}
{{- end }}

{{- /* The API server, at the address behind its Service. */ -}}
{{- define "lt.apiServer" -}}
to:
  {{- range .Values.networkPolicy.apiServerCidrs }}
  - ipBlock: {cidr: {{ . | quote }}}
  {{- end }}
ports:
  - {port: 443, protocol: TCP}
  - {port: 6443, protocol: TCP}
{{- end }}
