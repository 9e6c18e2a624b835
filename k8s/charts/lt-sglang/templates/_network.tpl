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
ports:
  - {port: 53, protocol: UDP}
  - {port: 53, protocol: TCP}
{{- end }}
